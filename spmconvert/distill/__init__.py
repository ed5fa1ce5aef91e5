"""Recovering quality: the loss of a converted model against its dense source, and the training loop around it."""
