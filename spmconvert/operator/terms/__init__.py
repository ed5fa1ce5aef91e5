"""Kinds of terms that a layer may be a sum of: one file each, and the registry that names them."""
