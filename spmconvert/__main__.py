"""``python -m spmconvert`` is the same as ``spmconvert``.

``-m`` puts the working directory first on the path of imports. It may be a checkpoint that somebody else made, whose files
must never run, so it is taken off before the other imports; it stays where the package itself lies there. The few modules
that Python needs to come this far (``contextlib``, ``typing``, ...) are found there all the same: in a directory that is
not trusted use ``spmconvert`` or ``python -P -m spmconvert``.
"""

import sys

if not sys.flags.safe_path and not __file__.startswith(f"{sys.path[0]}/spmconvert/"):
    del sys.path[0]

from spmconvert.cli import main

main()
