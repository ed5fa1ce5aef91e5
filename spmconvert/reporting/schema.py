"""The report as one validated object; report.json is this, and is checked against it when it is read back.

Every measured value stands beside its unit and the number of samples behind it; device and date are those of the whole
report, because a report is one run. What could not be measured is in ``not_measured`` with the reason and the remedy, so an
absent number is never a zero. This module does not import torch.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from spmconvert.errors import CheckpointError
from spmconvert.model.opening import shown_together
from spmconvert.system.parsing import parse_json

SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NotMeasured(_Part):
    """Something the report has no number for, why, and what to do about it."""

    what: str
    reason: str
    remedy: str


class Machine(_Part):
    """Where and with what everything was measured.

    Attributes:
        device: device of the models, ``cpu`` or ``cuda:0``.
        processor: name of the CPU or GPU.
        threads: threads torch used.
        cores: cores the system has.
        load: load average of the last minute at the start; well above the number of threads in use means disturbed timings.
        system: operating system.
        versions: of Python, spmconvert, torch and transformers.
    """

    device: str
    processor: str
    threads: int
    cores: int
    load: float | None
    system: str
    versions: dict[str, str]


class Model(_Part):
    """What was converted, from what, and how.

    Attributes:
        name: name of the checkpoint's directory.
        architecture: transformers class.
        weights_sha256: content hash over config and weights of the converted checkpoint.
        source: name of the dense checkpoint.
        source_revision: commit on the hub, None for a local directory.
        source_sha256: content hash that the conversion recorded.
        source_reachable: whether a checkpoint of that hash was found for this report.
        dtype: dtype of the measured models.
        converted_with: version of spmconvert that converted it.
        recipe: the resolved recipe.
        calibration: calibration text and rows, None when the fit used no data.
        finetuned: whether it was finetuned afterwards.
    """

    name: str
    architecture: str
    weights_sha256: str
    source: str
    source_revision: str | None
    source_sha256: str
    source_reachable: bool
    dtype: str
    converted_with: str
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    finetuned: bool


class Layer(_Part):
    """One replaced layer; errors are E‖y - ŷ‖² / E‖y‖² on held-out rows, from the conversion, before any finetuning.

    Attributes:
        name: module name.
        in_features: size of the input.
        out_features: size of the output.
        design: its terms in words.
        dense_parameters: before, bias included.
        parameters: after, bias included.
        dense_flops: FLOPs a token before.
        flops: FLOPs a token after, in the merged form.
        error: of this layer.
        baseline_error: of whitened truncated SVD with no more parameters.
        baseline_rank: its rank.
    """

    name: str
    in_features: int
    out_features: int
    design: str
    dense_parameters: int
    parameters: int
    dense_flops: int
    flops: int
    error: float
    baseline_error: float
    baseline_rank: int


def shown(layers: Sequence[Layer]) -> list[Layer]:
    """Layers as they are shown: experts of a projection are one line, with mean errors and all of their parameters."""
    lines = []
    for name, positions in shown_together([layer.name for layer in layers]).items():
        own = [layers[position] for position in positions]
        changes: dict[str, Any] = {"name": name if len(own) == 1 else f"{name} ({len(own)})"}
        for key in ("dense_parameters", "parameters", "dense_flops", "flops"):
            changes[key] = sum(getattr(layer, key) for layer in own)
        for key in ("error", "baseline_error"):
            changes[key] = statistics.fmean(getattr(layer, key) for layer in own)
        lines.append(own[0].model_copy(update=changes))
    return lines


class Quantity(_Part):
    """One amount before and after, for the replaced layers and for the whole model.

    Attributes:
        what: ``parameters``, ``tensor bytes``, ``FLOPs per token``, ``peak memory``.
        unit: its unit.
        scope: ``replaced layers`` or ``whole model``.
        dense: before.
        converted: after.
        note: how it was counted.
    """

    what: str
    unit: str
    scope: str
    dense: int
    converted: int
    note: str = ""


class Metric(_Part):
    """One measure of quality.

    Attributes:
        key: short name.
        title: name in words.
        unit: unit; ``share`` is shown as a percentage.
        dense: value of the dense model, None where the measure compares the two.
        converted: value of the converted model.
        higher_is_better: direction.
        samples: number of samples.
        sample: what a sample is.
        standard_error: of ``converted`` over rows, None where it is not a mean.
    """

    key: str
    title: str
    unit: str
    dense: float | None
    converted: float
    higher_is_better: bool
    samples: int
    sample: str
    standard_error: float | None = None


class Quality(_Part):
    """Measures on one text, on rows that neither the fit nor a finetune has seen.

    Attributes:
        text: name of the file.
        domain: ``first`` for --data, ``other`` for --other-data.
        sha256: hash of the file.
        rows_from: which of its rows were used, in words.
        rows: number of rows.
        tokens: number of tokens.
        metrics: what was measured; the first is the headline.
    """

    text: str
    domain: Literal["first", "other"]
    sha256: str
    rows_from: str
    rows: int
    tokens: int
    metrics: tuple[Metric, ...]


class Generation(_Part):
    """Greedy continuations of the same prompt."""

    prompt: str
    dense: str
    converted: str
    new_tokens: int


class Latency(_Part):
    """Percentiles of the time of one call, in milliseconds."""

    p20: float
    p50: float
    p80: float
    samples: int


class TimingRow(_Part):
    """Dense against converted for one size, timed in turn.

    Attributes:
        what: ``forward`` or ``generate``.
        tokens: tokens a call works on; for ``generate`` the new tokens.
        shape: rows x tokens of the input, in words.
        dense: latency before.
        converted: latency after.
    """

    what: Literal["forward", "generate"]
    tokens: int
    shape: str
    dense: Latency
    converted: Latency

    @property
    def ratio(self) -> float:
        """Dense time over converted time; above 1 the converted model is faster."""
        return self.dense.p50 / self.converted.p50

    @property
    def verdict(self) -> str:
        """``faster``, ``slower``, or ``no clear difference`` where the ranges from p20 to p80 overlap."""
        if self.converted.p80 < self.dense.p20:
            return "faster"
        return "slower" if self.converted.p20 > self.dense.p80 else "no clear difference"

    def throughput(self, which: Literal["dense", "converted"]) -> float:
        """Tokens a second at the median."""
        return 1000 * self.tokens / getattr(self, which).p50


class MethodResult(_Part):
    """One way to make the model smaller, or the untouched model.

    Attributes:
        key: ``dense``, ``spm``, ``svd``, ``2:4``, ``int8-weight-only`` or ``int8-dynamic``.
        title: name in words.
        parameters: parameters of the whole model.
        layer_parameters: parameters of the replaced layers.
        bytes: that its tensors take in a file; None in a report of before it was counted.
        note: what to know about it.
        metrics: measures on the first text, as for the converted model; empty without a text.
        latency: of a forward pass on ``tokens`` tokens, timed in turn with the others; None when nothing was timed.
        tokens: tokens of that pass.
    """

    key: str
    title: str
    parameters: int
    layer_parameters: int
    bytes: int | None = None
    note: str
    metrics: tuple[Metric, ...]
    latency: Latency | None
    tokens: int

    @property
    def is_int8(self) -> bool:
        """Whether it has the untouched model's parameters in fewer bits."""
        return self.key.startswith("int8")

    @property
    def described(self) -> str:
        """What to call it in a sentence."""
        return f"{self.title} of the untouched model" if self.is_int8 else self.title


class Task(_Part):
    """One result of lm-evaluation-harness."""

    task: str
    metric: str
    dense: float | None
    converted: float
    standard_error: float | None
    samples: int


class TrainingPoint(_Part):
    """One measurement on held-out rows while finetuning."""

    step: int
    tokens: int
    held_out_loss: float
    perplexity: float | None = None


class FinetuneRecord(_Part):
    """One finetune.

    Attributes:
        steps: optimizer steps.
        tokens: tokens trained on.
        objective: what the loss compares.
        start_loss: held-out loss before, a token or a decision.
        best_loss: of the state that was kept.
        data_sha256: hash of the text.
        seed: seed of split and order.
        stopped: why it ended early, or an empty string.
        history: all measurements.
    """

    steps: int
    tokens: int
    objective: str
    start_loss: float
    best_loss: float
    data_sha256: str
    seed: int
    stopped: str
    history: tuple[TrainingPoint, ...]


class RecordedOutput(_Part):
    """What the converted model answered to fixed tokens, for ``verify``.

    Attributes:
        tokens: token ids of one row.
        values: the first values of the last position's output.
        tolerance: largest difference, relative to the largest value, that another machine may show.
    """

    tokens: tuple[int, ...]
    values: tuple[float, ...]
    tolerance: float


class Report(_Part):
    """Everything ``spmconvert report`` found out about one converted checkpoint."""

    schema_version: Literal[1]
    created: str
    machine: Machine
    model: Model
    layers: tuple[Layer, ...]
    layer_errors_on: str
    quantities: tuple[Quantity, ...]
    training: tuple[FinetuneRecord, ...]
    quality: tuple[Quality, ...]
    generations: tuple[Generation, ...]
    timing: tuple[TimingRow, ...]
    candidates: tuple[MethodResult, ...]
    tasks: tuple[Task, ...]
    recorded_output: RecordedOutput | None
    not_measured: tuple[NotMeasured, ...]

    def quantity(self, what: str, scope: str) -> Quantity:
        """An amount by name and scope."""
        return next(quantity for quantity in self.quantities if (quantity.what, quantity.scope) == (what, scope))


def read_report(file: Path) -> Report:
    """Read a report.json back.

    Raises:
        CheckpointError: when it is not one, or of a version this package does not read.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{file} has schema_version {version!r}, this spmconvert reads {SCHEMA_VERSION}; report again"
            )
        return Report.model_validate(content)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{file} does not fit the schema at {field}; report again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); report again") from None
