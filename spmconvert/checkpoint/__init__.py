"""Reading dense checkpoints, writing converted ones, and what the latter say about themselves."""
