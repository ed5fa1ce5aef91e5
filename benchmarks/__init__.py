"""Scripts that make every figure of the README; run ``python -m benchmarks.NAME`` from the repository's root."""
