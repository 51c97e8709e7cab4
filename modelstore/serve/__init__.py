"""The Hugging Face Hub's protocol over a store, so that the Hub's own clients use it as it is. Needs Starlette and uvicorn.

app       one request from its head to its answer      run      the server as a process
routes    what a request's path names; pure            visits   a request while it is answered
refusals  errors as the Hub's clients know them        metrics  counters for Prometheus
reading/  models, revisions, files and their digests; a file's bytes, within a bounded memory; a feed of changes
writing/  uploads and the spool that keeps them; what a commit makes of the newest version
access/   tokens and what each may do; limits; signed addresses
"""
