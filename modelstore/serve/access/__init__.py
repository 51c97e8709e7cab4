"""Access: tokens, what each may do, limits, signed addresses."""
