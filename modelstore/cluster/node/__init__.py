"""On one machine: folders that belong to a process, files that only one user can read."""
