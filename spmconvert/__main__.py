"""``python -m spmconvert`` is the same as ``spmconvert``.

``-m`` puts the working directory first on the path of imports. It may be a checkpoint that somebody else made, whose files
must never run, so it is taken off before the other imports; it stays where the package itself lies there. The few modules
that Python needs to come this far (``contextlib``, ``typing``, ...) are found there all the same: in a directory that is
not trusted use ``spmconvert`` or ``python -P -m spmconvert``.

Both begin here, so that Ctrl-C is one line and exit code 130 while the rest is imported.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path and not __file__.startswith(f"{sys.path[0]}/spmconvert/"):
    del sys.path[0]

from spmconvert.system.interrupts import end_at_once


def run() -> None:
    """The program: import the command line, and run it."""
    end_at_once()
    from spmconvert.cli import main

    main()


if __name__ == "__main__":
    run()
