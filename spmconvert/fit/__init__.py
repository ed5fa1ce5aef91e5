"""Fitting: one layer by weighted least squares, and all layers of a conversion."""
