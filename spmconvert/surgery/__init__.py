"""Model surgery: which layers are replaced, the swap, and the hooks through which transformers loads the result."""
