"""Writing a checkpoint so that it is there completely or not at all, and so that nothing of anybody else's is lost.

While a run lasts everything goes into a hidden sibling of the output, ``.<name>.partial``: each finished layer as a file of
its own, then the final directory, which is renamed into place as the very last step. A run that is killed at any moment
leaves at most that sibling, from which ``--resume`` continues; one that is killed between its last two renames, with the
old output aside and the new one not yet in its place, is finished by the next run. A lock that the system releases with the
process keeps a second run out.

What a run may replace or remove is in ``places``. What it gives up: the output and its working directory need to be on one
file system.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from spmconvert.checkpoint.checksums import write_checksums
from spmconvert.checkpoint.headers import INDEX_FILE
from spmconvert.checkpoint.parts import Parts
from spmconvert.checkpoint.places import (
    CHOICE_FILE,
    COMMIT_FILE,
    FINAL_DIRECTORY,
    RUN_FILE,
    STATE_FILE,
    check_output,
    finish_commit,
    is_working_directory,
    partial_directory,
    remove_working_directory,
)
from spmconvert.errors import (
    CheckpointError,
    LockedError,
    NotWritableError,
    OutputError,
    SpaceError,
)

if TYPE_CHECKING:
    import torch
from spmconvert.system.files import save_whole, sync, write_errors, write_whole
from spmconvert.system.parsing import parse_json
from spmconvert.units import size

LARGEST_SHARD = 2 << 30
# room for headers, config, tokenizer and the layers stored beside the final files
SPACE_MARGIN = 1.1


class OutputDirectory:
    """The output of one run, from its lock to the final rename.

    Args:
        output: directory that will appear; where it is a symbolic link, the directory that the link names.
        fingerprint: hash of everything that decides about the bytes; a run is only resumed under the same one.
        force: replace an output of this tool that is there, and start over where an unfinished run is.
        resume: continue the unfinished run that is there.
        needed_bytes: space that the run needs.
        replaces: files of an output that the run replaces in place and has in the new one, too; None where it does not.
        resumable: whether the command can go on from an unfinished run.

    Attributes:
        layers: finished layers.
        blocks: what is final of blocks.

    Raises:
        LockedError: on entering, when another run holds the output.
        OutputError: on entering, when the output exists, there is nothing that can be resumed, or an unfinished run would
            be lost.
        NotWritableError: on entering, when the place cannot be written.
        SpaceError: on entering, when there is not enough free space.
    """

    def __init__(
        self,
        output: Path,
        *,
        fingerprint: str,
        force: bool,
        resume: bool,
        needed_bytes: int,
        replaces: Collection[str] | None = None,
        resumable: bool = True,
    ) -> None:
        self.output = Path(os.path.realpath(output))
        self.fingerprint, self.force, self.resume, self.needed_bytes = fingerprint, force, resume, needed_bytes
        self._replaces, self._resumable = replaces, resumable
        self.partial = partial_directory(self.output)
        self.layers, self.blocks = Parts(self.partial / "layers"), Parts(self.partial / "blocks")
        self._lock = FileLock(self.output.parent / f".{self.output.name}.lock")

    def _writing(self) -> AbstractContextManager[None]:
        """Names what the system refuses to write."""
        again = "continue with --resume" if self._resumable else "run the command again"
        return write_errors(self.output, "choose another output with -o", again)

    def __enter__(self) -> Self:
        """Take the lock, check the place, and set up the working directory."""
        with self._writing():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                self._prepare()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Release the lock; an unfinished run stays in the working directory."""
        self._release()

    def _acquire(self) -> None:
        file = Path(self._lock.lock_file)
        # locking empties the file; those of this tool are empty
        if file.is_symlink() or (file.exists() and file.stat().st_size):
            raise OutputError(f"{file} is not a lock of spmconvert; move it away or choose another output with -o")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            if not file.exists():
                # where no file can be made it waits as if somebody held it
                raise NotWritableError(
                    f"{file} cannot be made, which locks the output; choose another output with -o"
                ) from None
            raise LockedError(
                f"another run is writing {self.output}; wait for it, or choose another output with -o"
            ) from None

    def _release(self) -> None:
        # removed while it is still held, so that nobody can be waiting on a file that is gone
        with suppress(OSError):
            Path(self._lock.lock_file).unlink()
        self._lock.release()

    def _prepare(self) -> None:
        if finish_commit(self.output) and self.resume:
            raise OutputError(
                f"the interrupted run of {self.output} was complete and is in place now; nothing is left to do"
            )
        self._check_output()
        free = shutil.disk_usage(self.output.parent).free
        needed = int(self.needed_bytes * SPACE_MARGIN)
        if free < needed:
            raise SpaceError(
                f"{self.output.parent} has {size(free)} free, the output needs {size(needed)}; "
                "free some space or choose another output with -o"
            )
        self._open_partial()

    def _check_output(self) -> None:
        check_output(self.output, force=self.force or self._replaces is not None, carried=self._replaces or ())

    def _open_partial(self) -> None:
        run = self.partial / RUN_FILE
        unfinished = is_working_directory(self.partial)
        if self.resume:
            if not unfinished:
                raise OutputError(f"there is no unfinished run of {self.output} to resume; run again without --resume")
            if _read_fingerprint(run) != self.fingerprint:
                raise OutputError(
                    f"the unfinished run of {self.output} had other settings, another source or another version; "
                    "repeat its command exactly, or discard it with --force"
                )
        elif unfinished:
            self._discard()
        # the mark comes first
        self.partial.mkdir(exist_ok=True)
        write_whole(run, json.dumps({"fingerprint": self.fingerprint}), durable=True)
        (self.partial / "layers").mkdir(exist_ok=True)
        shutil.rmtree(self.final, ignore_errors=True)
        self.final.mkdir()

    def _discard(self) -> None:
        """Remove the working directory of an unfinished run, unless there is work in it that nobody gave up."""
        layers = len(list((self.partial / "layers").glob("*.safetensors")))
        has_work = layers or any((self.partial / name).exists() for name in (STATE_FILE, CHOICE_FILE))
        if has_work and not self.force:
            what = f"{layers} finished layers" if layers else "kept state"
            raise OutputError(
                f"there is an unfinished run of {self.output} with {what}; continue it with --resume, or discard it with "
                "--force"
            )
        remove_working_directory(self.partial)

    @property
    def final(self) -> Path:
        """The directory that will be renamed into place."""
        return self.partial / FINAL_DIRECTORY

    def store_layer(self, name: str, tensors: "dict[str, torch.Tensor]", record: dict[str, Any]) -> None:
        """Keep a finished layer: tensors by parameter name, and a record of JSON values."""
        with self._writing():
            self.layers.store(name, tensors, record)

    def store_block(self, name: str, tensors: "dict[str, torch.Tensor]", record: dict[str, Any]) -> None:
        """Keep what is final of a block: tensors by their names in the output, and a record of JSON values."""
        with self._writing():
            self.blocks.store(name, tensors, record)

    def store_file(self, name: str, content: bytes) -> None:
        """Keep what a run needs to go on beside finished layers; what was kept under the name before is replaced."""
        self.save_file(name, lambda file: file.write_bytes(content))

    def save_file(self, name: str, save: Callable[[Path], object]) -> None:
        """The same for a library that writes to the path it is given, so that the content need not be in memory twice."""
        with self._writing():
            save_whole(self.partial / name, save, durable=True)

    def load_file(self, name: str) -> bytes | None:
        """What was last kept under a name, or None."""
        file = self.partial / name
        return file.read_bytes() if file.exists() else None

    def write_weights(
        self,
        tensors: "Sequence[tuple[str, int, Callable[[], torch.Tensor]]]",
        *,
        shard_bytes: int = LARGEST_SHARD,
    ) -> None:
        """Write tensors into shards, one shard in memory at a time.

        The header's metadata is ``format`` alone: safetensors writes several keys in random order, and equal inputs are to
        give equal bytes.

        Args:
            tensors: name, bytes and reader of every tensor, in the order of the files.
            shard_bytes: most bytes a shard; a tensor that is larger has one of its own.
        """
        from huggingface_hub import split_state_dict_into_shards_factory
        from huggingface_hub.constants import SAFETENSORS_WEIGHTS_FILE_PATTERN

        readers = {name: read for name, _, read in tensors}
        split = split_state_dict_into_shards_factory(
            {name: size for name, size, _ in tensors},
            get_storage_size=int,
            filename_pattern=SAFETENSORS_WEIGHTS_FILE_PATTERN,
            max_shard_size=shard_bytes,
        )
        for file, names in split.filename_to_tensors.items():
            # outside of _writing: an error of the source is not one of the output
            contents = {name: readers[name]().contiguous() for name in names}
            with self._writing():
                _save_shard(contents, self.final / file)
            # before the next shard is read
            del contents
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            self.add_text(INDEX_FILE, json.dumps(index, indent=2) + "\n")

    def add_file(self, relative: str, source: Path) -> None:
        """Copy a file into the output.

        Raises:
            CheckpointError: when the source cannot be read.
        """
        try:
            stream = source.open("rb")
        except OSError as error:
            raise CheckpointError(f"{source} cannot be read ({error.strerror}); check that it is there") from error
        with stream, self._writing():
            (self.final / relative).parent.mkdir(parents=True, exist_ok=True)
            with (self.final / relative).open("wb") as copy:
                shutil.copyfileobj(stream, copy)

    def add_text(self, relative: str, text: str) -> None:
        """Write a text file into the output."""
        with self._writing():
            (self.final / relative).write_text(text, encoding="utf-8")

    def commit(self) -> None:
        """Make the output appear by one rename, and remove the working directory."""
        with self._writing():
            write_checksums(self.final)
            for path in [*self.final.rglob("*"), self.final]:
                sync(path)
            # somebody may have put something there since the run began
            self._check_output()
            aside = None
            if self.output.exists():
                aside = self.output.parent / f".{self.output.name}.{secrets.token_hex(8)}.old"
            note = {"aside": aside and aside.name}
            write_whole(self.partial / COMMIT_FILE, json.dumps(note), durable=True)
            if aside is not None:
                self.output.rename(aside)
            finish_commit(self.output)


def _save_shard(contents: "dict[str, torch.Tensor]", file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(contents, file, {"format": "pt"})
    except SafetensorError as error:
        # the library reports a full disk as text only
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    # safetensors makes files that only their owner can read
    file.chmod(0o666 & ~_umask())


def _read_fingerprint(run: Path) -> object:
    try:
        return parse_json(run.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{run} of the unfinished run is damaged; discard the run with --force") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
