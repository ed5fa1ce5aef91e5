"""Several processes of one command on this machine, as a launcher would start them.

PyTorch's own launcher answers a one-line error with two pages of its own and exit code 1; here the first process that fails
has the last word, with its exit code. As in ``spmconvert.system.fresh``, the processes read no input and import nothing
from the working directory. Several machines are what ``accelerate launch`` and ``torchrun`` are for.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from spmconvert.system.fresh import child_environment

# seconds for the first process to find out by itself what another one did
PATIENCE = 2.0


def run_in_processes(arguments: Sequence[str], count: int) -> int:
    """Run ``python -m spmconvert`` with these arguments in several processes that can talk to each other.

    Args:
        arguments: of the command line.
        count: number of processes.

    Returns:
        The exit code: that of the first process to fail, or 0.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
    }
    with tempfile.TemporaryDirectory() as quiet:
        workers = []
        for rank in range(count):
            environment = {**child_environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # only the first process speaks; what the others say matters where one of them fails first
            with open(f"{quiet}/{rank}", "w") as stream:  # noqa: PTH123 - a handle for the child
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "spmconvert", *arguments],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stderr=stream if rank else None,
                    )
                )
        failed = _wait(workers)
        if failed is None:
            return 0
        if failed:
            with open(f"{quiet}/{failed}") as stream:  # noqa: PTH123 - written by the child
                sys.stderr.write(stream.read())
        code = workers[failed].returncode
        # as a shell says which signal it was
        return code if code >= 0 else 128 - code


def _ends(worker: subprocess.Popen[bytes]) -> bool:
    """Whether a process fails by itself within a moment."""
    try:
        return bool(worker.wait(PATIENCE))
    except subprocess.TimeoutExpired:
        return False


def _wait(workers: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; the rank of the first that fails, after stopping the others, or None."""
    try:
        while any(worker.poll() is None for worker in workers):
            failed = next((rank for rank, worker in enumerate(workers) if worker.poll()), None)
            if failed is not None:
                # what all find out is said by the first
                return 0 if _ends(workers[0]) else failed
            time.sleep(0.1)
        return next((rank for rank, worker in enumerate(workers) if worker.returncode), None)
    except KeyboardInterrupt:
        # the terminal has told the workers too; the first one says how to resume
        for worker in workers:
            worker.wait()
        return 0
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()
