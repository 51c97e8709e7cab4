"""Shared code of the commands: options and how they are read, printing, and how a command ends."""
