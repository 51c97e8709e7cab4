"""What is live of packs that are mostly dead moves to new ones."""
