"""The read side: models, revisions and files, as the Hub gives them."""
