"""The machine: devices, caches, files that appear whole, and fresh processes."""
