"""Scripts that make every figure of docs/results.md; run ``python -m benchmarks.NAME`` from the repository's root."""
