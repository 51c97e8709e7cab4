"""Who is in a cluster: started, joined, watched, described."""
