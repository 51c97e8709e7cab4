"""The Hugging Face Hub's protocol over a store, so that the Hub's own clients use it as it is. Needs Starlette and uvicorn.

routes    what a request's path names; pure           ranges   what its Range header asks for; pure
library   models, revisions and files, as the Hub speaks of them
digests   SHA-256 of files, found once                sending  a file's bytes, within a bounded memory
reading   answers of the read side                    app      one request from its head to its answer
tokens    who may do what                       writing  what a commit makes of the newest version
spool     keeps uploads until then              run      the server as a process
"""
