"""What commands share: options and how they are read, what is printed, and how a command ends."""
