"""Tests run two at a time, so each has one thread: two that wait for each other's threads take longer than they work."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
