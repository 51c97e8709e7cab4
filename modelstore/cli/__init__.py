"""The command line: one small file per group of commands, over the same `Store` a program uses; terminal/ has what they share."""
