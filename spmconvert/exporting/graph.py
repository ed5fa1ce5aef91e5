"""A converted model as a graph is recorded of it: frozen, with named inputs and outputs of any number of rows and tokens.

What the graph is compared with is computed before the layers are frozen, on batches of other sizes than the one that it is
recorded on, so that a size that went into the graph is found out. A causal model is recorded without its cache.
"""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.checkpoint.converted import Converted
from spmconvert.data.tokens import keeps_cache, reads_tokens
from spmconvert.errors import BackendError, FitError, UnsupportedLayerError, first_line
from spmconvert.exporting.comparison import TOLERANCE, Comparison, checked, reads_more, sample_batch
from spmconvert.exporting.form import refuse_opened
from spmconvert.exporting.frozen import freeze_
from spmconvert.exporting.sentences import with_sentence_modules
from spmconvert.model.architecture import load_config, skeleton
from spmconvert.model.loading import load
from spmconvert.outputs.objective import real_mask
from spmconvert.outputs.probe import token_rows_batch

Batch = dict[str, Tensor]
# rows and tokens of batches that a graph of tokens is compared on, beside the one that it is recorded on
COMPARED = ((3, 7), (1, 11))
# why opened modules are no part of a graph
COUNTED = "which take tokens one by one or by their number, and a graph would hold that of one batch"


class NamedOutputs(nn.Module):
    """A model whose outputs are a dictionary of its floating-point tensors, so that a graph needs no other class."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.model.config

    def forward(self, **inputs: Tensor) -> Batch:
        """The model's outputs."""
        outputs = self.model(**inputs).items()
        return {name: value for name, value in outputs if isinstance(value, Tensor) and value.is_floating_point()}


@dataclass(frozen=True)
class Recorded:
    """A model that is ready to be recorded.

    Attributes:
        converted: checkpoint.
        model: frozen.
        batches: inputs, the first of which the graph is recorded on.
        expected: what the converted model puts out on each.
    """

    converted: Converted
    model: NamedOutputs
    batches: list[Batch]
    expected: list[Batch]

    @classmethod
    def of(cls, converted: Converted, dtype: Any) -> "Recorded":
        """Load a converted checkpoint.

        Args:
            converted: checkpoint.
            dtype: to load it in; ``auto`` for its own.

        Raises:
            UnsupportedLayerError: when there is nothing that it can be run on.
        """
        loaded = load(converted.directory, dtype=dtype).eval()
        batches = _batches(converted.directory, loaded)
        if keeps_cache(loaded.config):
            for config in {id(own): own for own in (loaded.config, loaded.config.get_text_config())}.values():
                config.use_cache = False
        model = NamedOutputs(with_sentence_modules(converted.directory, loaded))
        with torch.no_grad():
            expected = [model(**batch) for batch in batches]
        freeze_(loaded)
        return cls(converted, model.eval(), batches, expected)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Names of the axes whose size is free, by input."""
        axes: dict[str, dict[int, str]] = {}
        for name in self.batches[0]:
            text = name in ("input_ids", "attention_mask", "token_type_ids")
            decoder = {1: "decoder_sequence"} if name.startswith("decoder_") else {}
            axes[name] = {0: "batch", **({1: "sequence"} if text else decoder)}
        return axes

    def compare(self, run: Callable[[Batch], Batch], by: str) -> Comparison:
        """Run the graph on all batches.

        Args:
            run: gives outputs by name.
            by: what runs it, in words.

        Raises:
            FitError: when an output differs, or the graph does not run.
        """
        dtype = next(iter(self.expected[0].values())).dtype
        limit = TOLERANCE.get(dtype, max(TOLERANCE.values()))
        worst = Comparison(0.0, limit, "")
        for batch, expected in zip(self.batches, self.expected, strict=True):
            sizes = " x ".join(str(size) for size in next(iter(batch.values())).shape)
            try:
                found = run(batch)
            except Exception as error:
                raise FitError(
                    f"the graph does not run on {sizes} by {by}: {first_line(error)}; use another format"
                ) from error
            for name, value in expected.items():
                mask = real_mask(batch, value)
                own, other = (each.float() if mask is None else each[mask].float() for each in (value, found[name]))
                one = checked(self.converted.directory, own, other, limit, f"{name} of {sizes} by {by}")
                worst = max(worst, one, key=lambda each: each.difference or 0.0)
        shapes = ", ".join("x".join(str(size) for size in next(iter(batch.values())).shape) for batch in self.batches)
        return Comparison(worst.difference, limit, f"{', '.join(self.expected[0])} on {shapes} by {by}")

    def exported(self, exporter: str, config: str, **options: Any) -> Any:
        """Record it by an exporter of transformers.

        Args:
            exporter: module and class, after ``transformers.exporters``.
            config: name of its config's class.
            **options: of that.

        Raises:
            BackendError: when the exporter or a package that it needs is not there.
            UnsupportedLayerError: when the model cannot be recorded.
        """
        module, _, name = exporter.partition(":")
        free = {
            key: {axis: torch.export.Dim.DYNAMIC for axis in axes if self.batches[0][key].shape[axis] > 1 or axis}
            for key, axes in self.dynamic_axes().items()
        }
        with _quietly():
            try:
                found = __import__(f"transformers.exporters.{module}", fromlist=[name])
                made = getattr(found, name)()
                own = found.__dict__[config](dynamic_shapes=free, **options)
            except (ImportError, AttributeError, KeyError) as error:
                raise BackendError(f"{first_line(error)}; pip install 'spmconvert[onnx]' --upgrade") from None
            try:
                return made.export(self.model, dict(self.batches[0]), own).program
            except Exception as error:
                raise UnsupportedLayerError(
                    f"{self.converted.directory} cannot be recorded as a graph: {first_line(error)}; export with "
                    "--format portable or dense"
                ) from error


class GraphForm:
    """What the forms of a converted checkpoint that are graphs share.

    Raises:
        UnsupportedLayerError: when layers are those of experts or of a recurrence.
    """

    def __init__(self, converted: Converted) -> None:
        refuse_opened(converted, COUNTED)
        self.converted = converted

    @property
    def needed_bytes(self) -> int:
        """About the most that it takes: all layers dense, in float32."""
        return 4 * sum(parameter.numel() for parameter in skeleton(load_config(self.converted.directory)).parameters())


def _batches(directory: Path, model: Any) -> list[Batch]:
    first = sample_batch(directory, model)
    if first is None:
        raise UnsupportedLayerError(f"{directory}: {reads_more(model)}; put the processor there")
    if not reads_tokens(model.config):
        keep = {name: value for name, value in first.items() if isinstance(value, Tensor)}
        return [keep, {name: value[:1] for name, value in keep.items()}]
    # two rows: a single one would be recorded as a size of its own
    length = first["input_ids"].shape[1]
    batches = [token_rows_batch(model, rows, tokens) for rows, tokens in ((2, length), *COMPARED) if tokens <= length]
    for batch in batches[1:]:
        # some padding
        batch["attention_mask"][0, -2:] = 0
    if _reads_types(model):
        batches = [{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in batches]
    return batches


def _reads_types(model: Any) -> bool:
    return (
        "token_type_ids" in inspect.signature(model.forward).parameters
        and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what exporters print and warn about on their way; what goes wrong is raised, and the result is compared."""
    loggers = [logging.getLogger(name) for name in ("transformers", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
