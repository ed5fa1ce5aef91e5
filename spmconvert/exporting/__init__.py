"""Converted checkpoints in the forms of other runtimes: one file a format, and what they share."""
