"""Memory that is left is what the system and the control groups leave."""

import pytest

from spmconvert.system import memory

MEMINFO = "MemTotal:       64000000 kB\nMemAvailable:   50000000 kB\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write files under another root."""
    monkeypatch.setattr(memory, "ROOT", tmp_path)

    def write(files):
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    return write


def test_nothing_says_so(system):
    assert memory.free_memory("cpu") is None


def test_without_groups_it_is_the_system(system):
    system({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"})
    assert memory.free_memory("cpu") == 50_000_000 * 1024


def test_a_container_has_what_its_group_leaves(system):
    group = "sys/fs/cgroup/"
    stat = "anon 500\nfile 700\ninactive_file 200\n"
    files = {"memory.max": "2000\n", "memory.current": "1500\n", "memory.stat": stat}
    system({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", **{group + name: text for name, text in files.items()}})
    assert memory.free_memory("cpu") == 700


def test_a_group_has_no_more_than_those_around_it(system):
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/outer/inner\n"}
    for name, limit in (("outer", "1000"), ("outer/inner", "max")):
        files |= {f"sys/fs/cgroup/{name}/memory.max": limit, f"sys/fs/cgroup/{name}/memory.current": "900"}
    system(files)
    assert memory.free_memory("cpu") == 100
    system({"sys/fs/cgroup/outer/inner/memory.max": "50"})
    assert memory.free_memory("cpu") == 0


def test_groups_of_the_first_version(system):
    # a container sees its own group as the root, and its path as the system names it
    groups = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/0123\n0::/\n"}
    files = {"limit_in_bytes": "3000", "usage_in_bytes": "1000", "stat": "cache 9\ntotal_inactive_file 10\n"}
    system({**groups, **{f"sys/fs/cgroup/memory/memory.{name}": text for name, text in files.items()}})
    assert memory.free_memory("cpu") == 2010
