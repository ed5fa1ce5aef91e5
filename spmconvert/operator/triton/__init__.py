"""The operator in Triton: kernels, their tiles and launches, and the torch operators made of them."""
