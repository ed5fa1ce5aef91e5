"""The command line: options in, one command run, its result printed."""

from spmconvert.cli.app import main

__all__ = ["main"]
