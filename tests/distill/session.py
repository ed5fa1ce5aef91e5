"""Several commands one after the other in every process of a launcher: ``torchrun -m tests.distill.session JSON``.

A process takes longer to start than a tiny model to train, so the tests of several processes share them.
"""

import json
import os
import sys

from spmconvert.cli import main


def run_commands(commands: list[list[str]]) -> None:
    """Run each, and say how it ended in this process."""
    for arguments in commands:
        sys.argv = ["spmconvert", *arguments]
        try:
            main()
        except SystemExit as ended:
            print(f"process {os.environ['RANK']} ended with {ended.code or 0}", flush=True)


if __name__ == "__main__":
    run_commands(json.loads(sys.argv[1]))
