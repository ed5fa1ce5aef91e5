"""What the parts of one report share: both models, where they run, and what could not be measured."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from spmconvert.checkpoint.converted import Converted, open_source
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.data.tokens import reads_tokens
from spmconvert.errors import CheckpointError, ModelNotFoundError
from spmconvert.model.loading import load, load_whole
from spmconvert.outputs.probe import runs_on_tokens
from spmconvert.reporting.schema import NotMeasured


@dataclass
class ReportRun:
    """What the parts of one report share."""

    converted: Converted
    config: Any
    device: str
    seconds: float
    progress: Callable[[str], None]
    source: Checkpoint | None = None
    dense: Any = None
    student: Any = None
    not_measured: list[NotMeasured] = field(default_factory=list)

    def open_dense(self, teacher: str | None) -> None:
        """Load both models; without a source that is only the converted one."""
        self.student = load(self.converted.directory, dtype="auto").to(self.device).eval()
        try:
            self.source = open_source(self.converted, teacher)
        except (ModelNotFoundError, CheckpointError) as error:
            if teacher is not None:
                raise
            self.note_missing(
                "everything that needs the dense model: quality, time, memory", str(error), "name it with --teacher"
            )
            return
        dense = load_whole(self.source.directory, self.config, dtype="auto")
        self.dense = dense.to(self.device).eval()

    def note_missing(self, what: str, reason: str, remedy: str) -> None:
        """Note something that was not measured."""
        self.not_measured.append(NotMeasured(what=what, reason=reason, remedy=remedy))

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether the model's input is text alone."""
        return reads_tokens(self.config) and runs_on_tokens(self.student)
