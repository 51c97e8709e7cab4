"""Many machines as one store: hosts that hold shards, placement, reading through them, jobs on them. Needs Ray to run."""
