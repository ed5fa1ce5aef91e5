"""The log of a run: one JSON object a line beside the output, the experiment tracker, and whoever watches.

Only the first process writes. A resumed run drops the lines after the state it goes on from.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from spmconvert.recipe.recipe import Training


class RunLog:
    """Writes what a training run reports.

    Args:
        output: directory the run will write; the log is the same name with ``.jsonl``.
        accelerator: of the run.
        training: recorded by trackers.
        snapshot: what the run goes on from, or None.
        report: told about every record as well.
    """

    def __init__(
        self,
        output: Path,
        accelerator: Any,
        training: Training,
        snapshot: dict[str, Any] | None,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self._accelerator, self._report = accelerator, report
        self._file = output.resolve().with_name(f"{output.resolve().name}.jsonl")
        self._last_step = -1 if snapshot is None else snapshot["state"]["step"]
        self._training = training
        self._stream: IO[str] | None = None

    def __enter__(self) -> Self:
        """Open the log."""
        if self._accelerator.log_with:
            self._accelerator.init_trackers("spmconvert", config=self._training.model_dump(mode="json"))
        if self._accelerator.is_main_process:
            kept = [line for line in self._lines() if json.loads(line).get("step", 0) <= self._last_step]
            self._stream = self._file.open("w", encoding="utf-8")
            self._stream.writelines(f"{line}\n" for line in kept)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Close the log."""
        if self._accelerator.log_with:
            self._accelerator.end_training()
        if self._stream is not None:
            self._stream.close()

    def write(self, record: dict[str, Any]) -> None:
        """Pass a record on."""
        if self._stream is None:
            return
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        if self._accelerator.log_with and "layer" not in record:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
            self._accelerator.log(numbers, step=record["step"])
        self._report(record)

    def _lines(self) -> list[str]:
        if self._last_step < 0 or not self._file.exists():
            return []
        return [line for line in self._file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
