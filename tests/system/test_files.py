"""What survives a power failure: the order in which content and names are put onto the disk."""

import os
from pathlib import Path

import pytest

from spmconvert.system.files import write_whole
from tests.support import watch_disk


def test_a_durable_file_is_on_the_disk_before_its_name_and_then_the_name(tmp_path, monkeypatch):
    file = tmp_path / "found.json"
    happened = watch_disk(monkeypatch)
    write_whole(file, "content", durable=True)
    (first, written), (second, renamed), (third, directory) = happened
    assert (first, second, third) == ("sync", "rename", "sync")
    assert written == renamed != file
    assert directory == tmp_path
    assert file.read_text() == "content"


def test_other_files_are_whole_without_waiting_for_the_disk(tmp_path, monkeypatch):
    happened = watch_disk(monkeypatch)
    write_whole(tmp_path / "found.json", b"content")
    assert [what for what, _ in happened] == ["rename"]


@pytest.mark.parametrize(("owner", "name"), [(Path, "write_bytes"), (os, "fsync"), (Path, "replace")])
def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, owner, name):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = tmp_path / "found.json"
    write_whole(file, "old")
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new", durable=True)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    assert file.read_text() == "old"
