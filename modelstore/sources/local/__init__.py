"""Files and folders of this machine: which belong to a checkpoint, how they are read, and whether they change meanwhile."""
