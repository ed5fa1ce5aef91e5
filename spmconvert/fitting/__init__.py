"""Fitting an SPM layer to a dense one: activation statistics, the low-rank baseline, starts and the solver."""
