"""``python -m spmconvert`` is the same as ``spmconvert``."""

from spmconvert.cli import main

main()
