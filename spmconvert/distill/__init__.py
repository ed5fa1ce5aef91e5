"""Distillation: what the student is asked to match, on which rows, and the loop that does it."""
