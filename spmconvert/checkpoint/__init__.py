"""Checkpoints on disk: reading and checking them, and writing one so that it is there completely or not at all."""
