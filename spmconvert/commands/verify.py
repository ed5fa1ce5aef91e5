"""Whether a converted checkpoint is what it says it is, check by check.

Files are compared with the hashes that were noted when they were written, headers with the layer map, values with what is
finite, and every tensor that was not replaced with the source, byte for byte. Then the checkpoint is loaded in a fresh
process, as a user would, and answers the tokens that the last report recorded. All but that takes one tensor at a time. A
check whose input is missing, or that memory does not suffice for, is skipped and says so; it does not count as passed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from spmconvert.checkpoint.checksums import listed_files, read_checksums
from spmconvert.checkpoint.converted import Converted, open_converted, open_source
from spmconvert.checkpoint.headers import TensorEntry
from spmconvert.checkpoint.manifest import CHECKSUM_FILE, PROVENANCE_FILE, REPORT_FILES
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.errors import CheckpointError, ModelNotFoundError, SpmconvertError
from spmconvert.model.architecture import load_config, skeleton
from spmconvert.model.opened import is_opened, opened, restricted, stacked_names
from spmconvert.model.opening import open_, opened_names
from spmconvert.model.stored import stored_prefixes
from spmconvert.model.swap import layer_from_spec
from spmconvert.reporting.schema import Report, read_report
from spmconvert.system.files import file_hash
from spmconvert.system.fresh import run_fresh
from spmconvert.system.memory import free_memory
from spmconvert.units import size

Outcome = Literal["ok", "FAILED", "skipped"]
CHUNK = 1 << 24


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        outcome: ``ok``, ``FAILED`` or ``skipped``.
        detail: what was found.
    """

    name: str
    outcome: Outcome
    detail: str


def verify(directory: str | Path, *, teacher: str | None = None) -> list[Check]:
    """Check a converted checkpoint.

    Args:
        directory: output of a conversion or of a finetune.
        teacher: another place of the source checkpoint; None for the recorded one.

    Returns:
        One entry a check, in order. A checkpoint that cannot be opened has one.

    Raises:
        ModelNotFoundError: when there is no such directory.
        CheckpointError: when ``teacher`` is not the source.
    """
    try:
        converted = open_converted(Path(directory), recorded=False)
    except CheckpointError as error:
        return [Check("files", "FAILED", str(error))]
    if teacher is not None and converted.provenance:
        # asked for by name, so that another one is no fault of the checkpoint
        open_source(converted, teacher)
    count = len(converted.tensors)
    agreeing = "config, layer map, provenance" if converted.provenance else f"config, layer map (without {PROVENANCE_FILE})"
    checks = [Check("files", "ok", f"{agreeing} and headers of {count} tensors agree"), *check_files(converted)]
    steps: tuple[tuple[str, Callable[[], list[Check]]], ...] = (
        ("untouched tensors", lambda: [_untouched(converted, teacher)]),
        ("fresh process", lambda: _runs(converted)),
    )
    return checks + _taken(steps)


def check_files(converted: Converted) -> list[Check]:
    """The checks of hashes, shapes and values alone, which need neither the source nor a model."""
    return _taken(
        (
            ("hashes", lambda: [_hashes(converted)]),
            ("shapes", lambda: [_shapes(converted)]),
            ("finite values", lambda: [_finite(converted)]),
        )
    )


def _taken(steps: tuple[tuple[str, Callable[[], list[Check]]], ...]) -> list[Check]:
    checks: list[Check] = []
    for name, step in steps:
        try:
            checks += step()
        except SpmconvertError as error:
            checks.append(Check(name, "FAILED", str(error)))
    return checks


def _hashes(converted: Converted) -> Check:
    name, directory = "hashes", converted.directory
    if not (directory / CHECKSUM_FILE).is_file():
        return Check(name, "skipped", f"there is no {CHECKSUM_FILE}; convert again to have one")
    hashes = read_checksums(directory)
    unlisted = sorted(set(listed_files(directory)) - set(hashes))
    if unlisted:
        return Check(name, "FAILED", f"{', '.join(unlisted)} not in {CHECKSUM_FILE}, so nothing is known of it")
    changed = [
        relative
        for relative, digest in hashes.items()
        if not (directory / relative).is_file() or file_hash(directory / relative) != digest
    ]
    if changed:
        return Check(name, "FAILED", f"{', '.join(changed)} changed or gone since the checkpoint was written")
    return Check(name, "ok", f"{len(hashes)} files are as they were written")


def _shapes(converted: Converted) -> Check:
    expected = {}
    prefixes = stored_prefixes(converted)
    for layer, spec in converted.entries.items():
        stack = () if spec.experts is None else (spec.experts,)
        # parameters, indices and the mark
        for part, tensor in layer_from_spec(spec, device="meta").state_dict().items():
            expected[f"{prefixes[layer]}.{part}"] = (*stack, *tensor.shape)
    for name, shape in expected.items():
        entry = converted.tensors.get(name)
        if entry is None or entry.shape != shape:
            what = "is missing" if entry is None else f"is {entry.shape}"
            return Check("shapes", "FAILED", f"tensor {name} {what}, the layer map says {shape}")
    inside = tuple(f"{prefix}." for prefix in prefixes.values())
    odd = sorted(name for name in converted.tensors if name not in expected and name.startswith(inside))
    if odd:
        return Check("shapes", "FAILED", f"tensor {odd[0]} is in a replaced layer, and the layer map has none there")
    return Check("shapes", "ok", f"{len(expected)} tensors of {len(converted.entries)} layers are as the layer map says")


def _finite(converted: Converted) -> Check:
    checkpoint = converted.checkpoint()
    for name in converted.tensors:
        checkpoint.read_finite(name)
    return Check("finite values", "ok", f"all values of {len(converted.tensors)} tensors are finite")


def _untouched(converted: Converted, teacher: str | None) -> Check:
    name = "untouched tensors"
    if not converted.provenance:
        return Check(name, "skipped", f"there is no {PROVENANCE_FILE}, which says what the checkpoint was made of")
    try:
        source = _as_converted(open_source(converted, teacher), converted)
    except (ModelNotFoundError, CheckpointError) as error:
        if teacher is not None:
            raise
        return Check(name, "skipped", f"the source cannot be compared: {error}")
    prefixes = tuple(f"{prefix}." for prefix in stored_prefixes(converted).values())
    stacks = stacked_names(source)
    before: dict[str, list[str]] = {}
    for key in source.tensors:
        if not (written := stacks.get(key, key)).startswith(prefixes):
            before.setdefault(written, []).append(key)
    after = [key for key in converted.tensors if not key.startswith(prefixes)]
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))
        return Check(name, "FAILED", f"{len(odd)} tensors are on one side only, for example {odd[0]}")
    changed = [key for key, parts in before.items() if not _is_same(source, converted, key, parts)]
    trained = {run["recipe"]["train"] for run in converted.provenance.get("finetune", [])}
    refined = set(converted.provenance.get("refined", {}).get("tensors", []))
    changed = [key for key in changed if key not in refined]
    # a finetune of norms trains biases as well: all that has one dimension
    excused = [
        key for key in changed if "all" in trained or ("norms" in trained and len(converted.tensors[key].shape) == 1)
    ]
    odd = sorted(set(changed) - set(excused))
    if odd:
        return Check(name, "FAILED", f"{len(odd)} of {len(before)} differ from the source, for example {odd[0]}")
    if excused:
        same = len(before) - len(excused) - len(refined)
        scopes = ", ".join(sorted(trained))
        return Check(name, "ok", f"{same} of {len(before)} are those of the source; a finetune trained {scopes}")
    note = f"; {len(refined)} norms and biases were refined with their blocks" if refined else ""
    return Check(name, "ok", f"{len(before) - len(refined)} tensors are byte for byte those of the source{note}")


def _runs(converted: Converted) -> list[Check]:
    """Load the checkpoint in a fresh process, and compare its answer with the recorded entry."""
    needed, free = sum(entry.nbytes for entry in converted.tensors.values()), free_memory("cpu")
    if free is not None and needed > free:
        short = f"the model takes {size(needed)} of memory, {size(free)} is free; verify where there is more"
        return [Check("fresh process", "skipped", short)]
    report = _report(converted)
    record = None if report is None else report.recorded_output
    tokens = None if record is None else list(record.tokens)
    answer = run_fresh("spmconvert.commands.verify:loaded", str(converted.directory), tokens)
    loads = Check("fresh process", "ok", f"loads as {answer['architecture']} with {answer['layers']} SPM layers")
    if record is None:
        remedy = "no report has recorded outputs of these weights; run spmconvert report first"
        return [loads, Check("recorded outputs", "skipped", remedy)]
    largest = max(abs(value) for value in record.values)
    difference = max(abs(a - b) for a, b in zip(answer["values"], record.values, strict=True)) / (largest or 1)
    outcome: Outcome = "ok" if difference <= record.tolerance else "FAILED"
    detail = f"largest difference {difference:.2g} of the largest value, tolerance {record.tolerance:g}"
    return [loads, Check("recorded outputs", outcome, detail)]


def loaded(directory: str, tokens: list[int] | None) -> dict[str, object]:
    """Load a checkpoint in this process; its architecture, its SPM layers, and its answer to the tokens."""
    from spmconvert.model.loading import load
    from spmconvert.model.stacked_experts import is_converted
    from spmconvert.reporting.recorded import recorded_values

    model = load(directory, dtype="auto").eval()
    return {
        "architecture": type(model).__name__,
        "layers": sum(map(is_converted, model.modules())),
        "values": None if tokens is None else recorded_values(model, tokens),
    }


def _report(converted: Converted) -> Report | None:
    """The checkpoint's own report, where it is one of these weights."""
    file = converted.directory / REPORT_FILES[0]
    if not file.is_file():
        return None
    report = read_report(file)
    return report if report.model.weights_sha256 == converted.checkpoint().sha256() else None


def _as_converted(source: Checkpoint, converted: Converted) -> Checkpoint:
    """The source with those experts opened that the conversion opened."""
    modules = opened_names(converted.layers)
    if not modules:
        return source
    model = skeleton(load_config(converted.directory))
    open_(model)
    prefixes = stored_prefixes(converted)
    names = (name for layer, spec in converted.entries.items() for name in spec.names(prefixes[layer]))
    return restricted(opened(source, model), (f"{name}.weight" for name in names))


def _is_same(source: Checkpoint, converted: Converted, name: str, parts: list[str]) -> bool:
    """Whether a tensor is that of the source, or the tensors of all its experts stacked."""
    entry, other = source.tensors[parts[0]], converted.tensors[name]
    if not is_opened(source, parts[0]):
        return _same_bytes(entry, other)
    own = [source.read(part) for part in parts]
    expected = torch.stack(own) if parts[0] in stacked_names(source) else own[0]
    return entry.dtype == other.dtype and expected.equal(converted.checkpoint().read(name))


def _same_bytes(entry: TensorEntry, other: TensorEntry) -> bool:
    if (entry.dtype, entry.shape, entry.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    with entry.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(entry.start)
        second.seek(other.start)
        for start in range(0, entry.nbytes, CHUNK):
            size = min(CHUNK, entry.nbytes - start)
            if first.read(size) != second.read(size):
                return False
    return True
