"""How much memory is left: what the system has, and what the control groups of this process still allow of it.

A container of 2 GiB on a machine of 64 shows 64 in /proc/meminfo, and is ended by the kernel at two.
"""

from collections.abc import Iterator
from pathlib import Path

# where the system says these things, for tests another place
ROOT = Path("/")
# files of control groups of the first and the second version: limit, use, and what of the use may be forgotten
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
SECOND = ("memory.max", "memory.current", "inactive_file")


def free_memory(device: str) -> int | None:
    """Bytes of a device's memory that are free or can be made so; None where nothing says so."""
    if device == "cpu":
        return min((found for found in (_system(), *_groups()) if found is not None), default=None)
    import torch

    kind = torch.device(device)
    return torch.cuda.mem_get_info(kind)[0] if kind.type == "cuda" and torch.cuda.is_available() else None


def _system() -> int | None:
    lines = _lines(ROOT / "proc/meminfo")
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else 1024 * int(found.split()[1])


def _groups() -> Iterator[int | None]:
    """What is left in the groups of this process and in those that they are in."""
    mounted = ROOT / "sys/fs/cgroup"
    for line in _lines(ROOT / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        base, names = (mounted, SECOND) if not controllers else (mounted / "memory", FIRST)
        if not controllers or "memory" in controllers.split(","):
            own = base / path.lstrip("/")
            yield from (_left(group, *names) for group in (own, *own.parents) if group.is_relative_to(base))


def _left(group: Path, limit: str, used: str, cache: str) -> int | None:
    """What a group's limit leaves; files that were read and may be forgotten do not count as used."""
    numbers = [next(iter(_lines(group / name)), "") for name in (limit, used)]
    if not all(number.isdigit() for number in numbers):
        return None
    stat = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat"))
    return max(0, int(numbers[0]) - int(numbers[1]) + int(stat.get(cache, 0)))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
