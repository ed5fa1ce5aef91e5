"""A transformers model as modules: which class a config names, loading it, and swapping layers."""
