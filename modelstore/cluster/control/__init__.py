"""The members of a cluster: started, joined, watched, described."""
