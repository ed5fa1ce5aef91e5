"""A converted checkpoint on the Hugging Face hub, in one commit.

What is pushed are the checkpoint's own files: those that its list of hashes has and those beside it that may change, or,
of what ``save_pretrained`` wrote, weights, config, tokenizer and card. Anything else in the directory is named and refused,
since a training state or a log that goes along by accident is public at once, and a link out of the directory is, too.
What is damaged or not finished is refused as well. Files of an earlier push that would be read in the place of new ones,
such as shards of another division, are removed in the same commit; whatever else the repository holds stays.

One commit, in place of the library's ``upload_folder`` that may cut a folder into several: nobody who loads the model in
between gets parts of two. The library decides what goes by LFS.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spmconvert.checkpoint.checksums import UNLISTED_FILES, read_checksums
from spmconvert.checkpoint.converted import Converted, open_converted
from spmconvert.checkpoint.manifest import CHECKSUM_FILE
from spmconvert.checkpoint.reader import WRITTEN_ANEW
from spmconvert.checkpoint.unfinished import find_unfinished
from spmconvert.commands.verify import check_files
from spmconvert.errors import NotWritableError, OptionError, OutputError, SpmconvertError, VerificationError, first_line
from spmconvert.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# what trainers leave beside a model that is no pickle, which companions of a checkpoint are not anyway
TRAINING_FILES = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
LOG_SUFFIXES = (".log", ".jsonl", ".lock")
NO_ACCESS = (401, 403)


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        url: of the model, or of its branch.
        repository: its id, with the owner.
        commit: hash of the commit.
        files: how many the checkpoint has.
        bytes: of them.
    """

    url: str
    repository: str
    commit: str
    files: int
    bytes: int


def push(
    directory: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Upload a converted checkpoint; the repository and the branch are made where they are not there.

    Args:
        directory: converted checkpoint.
        repository: id on the hub, ``name`` or ``owner/name``.
        private: only the owner is to see it.
        revision: branch; None for the main one.
        message: of the commit.

    Raises:
        OptionError: when the id is none.
        ModelNotFoundError: when there is no such directory.
        CheckpointError: when it is no converted checkpoint, or a file is a link out of it.
        VerificationError: when its files are damaged.
        OutputError: when it is not finished, holds files that are not the checkpoint's, or the hub cannot be reached.
        NotWritableError: when there is no token, or it does not allow to write there.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OptionError(f"{repository!r} names no repository ({first_line(error)}); write NAME or OWNER/NAME") from None
    files = own_files(Path(directory))
    if HF_HUB_OFFLINE:
        raise OutputError("HF_HUB_OFFLINE is set, so nothing is pushed; unset it")
    if get_token() is None:
        raise NotWritableError("there is no token of the hub on this machine; log in by hf auth login, or set HF_TOKEN")
    api = HfApi(library_name="spmconvert", library_version=__version__)
    with _reaching(repository):
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(made.repo_id).private:
            raise OutputError(f"{made.repo_id} is there and public; make it private on the hub, or leave --private out")
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        commit = _commit(api, made.repo_id, files, revision, message)
    url = str(made) if revision is None else f"{made}/tree/{revision}"
    return Pushed(url, made.repo_id, commit, len(files), sum(path.stat().st_size for path in files.values()))


def own_files(directory: Path) -> dict[str, Path]:
    """The files of a checkpoint that may be published, by their names there.

    Raises:
        SpmconvertError: as ``push``.
    """
    unfinished = find_unfinished(directory)
    if unfinished is not None:
        raise OutputError(f"{unfinished.output} is not finished, {unfinished.progress}; finish it with --resume first")
    converted = open_converted(directory, recorded=False)
    own = _own_names(converted)
    found = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if (path.is_symlink() or not path.is_dir()) and not _is_hidden(path.relative_to(directory))
    }
    foreign = [name for name in found if name not in own or _is_left_over(name)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise OutputError(
            f"{directory} holds {foreign[0]}{more}, which the checkpoint does not have by itself and would be published; "
            "move it away, and add it on the hub if it belongs there"
        )
    for path in found.values():
        converted.checkpoint().check_inside(path)
    failed = [check for check in check_files(converted) if check.outcome == "FAILED"]
    if failed:
        raise VerificationError(f"{directory} failed the check of {failed[0].name}: {failed[0].detail}; convert again")
    return found


def _own_names(converted: Converted) -> set[str]:
    directory = converted.directory
    if (directory / CHECKSUM_FILE).is_file():
        return {*read_checksums(directory), *UNLISTED_FILES}
    weights = {entry.file for entry in converted.tensors.values()}
    companions = converted.checkpoint().companion_files()
    return {path.relative_to(directory).as_posix() for path in (*weights, *companions)} | {*WRITTEN_ANEW}


def _is_hidden(relative: Path) -> bool:
    """Whether version control or a download keeps it for itself."""
    return any(part.startswith(".") for part in relative.parts)


def _is_left_over(name: str) -> bool:
    return name in TRAINING_FILES or name.endswith(LOG_SUFFIXES) or "events.out.tfevents" in name


def _commit(api: "HfApi", repository: str, files: dict[str, Path], revision: str | None, message: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = api.list_repo_files(repository, revision=revision)
    stale = [name for name in there if name not in files and _would_be_read(name)]
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    removed = [CommitOperationDelete(path_in_repo=name) for name in stale]
    text = message or f"Push a checkpoint converted by spmconvert {__version__}"
    return str(api.create_commit(repository, [*added, *removed], commit_message=text, revision=revision).oid)


def _would_be_read(name: str) -> bool:
    """Whether a file at the top of a repository is taken for one of the checkpoint that is pushed there."""
    written = "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
    return written or (name in UNLISTED_FILES and name != "README.md")


@contextmanager
def _reaching(repository: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
    try:
        yield
    except SpmconvertError:
        raise
    # the client lets errors of its HTTP library through, and which library that is differs between its versions
    except Exception as error:
        # an upload in a thread says only which file it was of
        reason = first_line(error) if error.__cause__ is None else f"{first_line(error)} {first_line(error.__cause__)}"
        if getattr(getattr(error, "response", None), "status_code", None) in NO_ACCESS:
            raise NotWritableError(
                f"the hub does not let this token write to {repository} ({reason}); use one that may, or another repository"
            ) from error
        raise OutputError(f"{repository} cannot be written on the hub ({reason}); check name and network") from error
