"""Every command that writes, stopped at each of its steps; and what the next run makes of what is left.

    python -m tests.robustness.campaign convert finetune in-place export --every 1

After each stop the source is what it was and there is no output, the old one, or a whole one. The command is then
repeated, with and without ``--resume``: it ends with the bytes of a run that nothing stopped, or with one line that says
what to do, and doing that ends with these bytes. A disk that is full from a step on is one line with its exit code, and
nothing half-written.
Prints a line of JSON for each command, with what was wrong.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tests.robustness.steps import KILLED, Ended, Watch, run_forked
from tests.support import files_of

SPACE, UNWRITABLE = 11, 12
CONVERT = [
    "--calib",
    "none",
    "--stages",
    "2",
    "--layers",
    "0",
    "--no-measure",
    "--refine",
    "0",
    "--set",
    "fit.iterations=1",
]
FINETUNE = ["--data", "t.txt", "--steps", "2", "--block-size", "8", "--batch-size", "2", "--no-measure"]
FINETUNE += ["--set", "evaluation_rows=2", "--set", "save_every=1", "--set", "evaluate_every=1"]
# the command, its output, what is there before beside the dense model, and whether it can be resumed
COMMANDS = {
    "convert": (["convert", "m", "-o", "o", *CONVERT], "o", (), True),
    "convert-force": (["convert", "m", "-o", "o", "--force", *CONVERT], "o", ("o",), True),
    "finetune": (["finetune", "c", "-o", "o", *FINETUNE], "o", ("c",), True),
    "in-place": (["finetune", "c", "--in-place", *FINETUNE], "c", ("c",), True),
    "export": (["export", "c", "-o", "o"], "o", ("c",), False),
    "export-force": (["export", "c", "-o", "o", "--force"], "o", ("c", "o"), False),
}
MOST_RUNS = 4


@dataclass
class Result:
    """What a campaign against one command found."""

    command: str
    steps: int = 0
    kills: int = 0
    full: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """One command, its workspace as it is before, and what a run that nothing stops makes of it.

    Args:
        name: of the command.
        base: folder with the dense model ``m``, the conversion ``c`` and the text ``t.txt``.
        scratch: where workspaces are made.
    """

    def __init__(self, name: str, base: Path, scratch: Path) -> None:
        self.command, self.output, there, self.resumable = COMMANDS[name]
        self.result, self.scratch, self.start = Result(name), scratch, scratch / "start"
        self.start.mkdir(parents=True)
        for part in ("m", "t.txt"):
            _copy(base / part, self.start / part)
        for part in there:
            # another conversion than the one that takes its place
            _copy(base / ("old" if part == "o" else part), self.start / part)
        self.sources = {part: files_of(self.start / part) for part in ("m", *there) if part != self.output}
        # the same place for all runs, since provenance has the source's
        whole = self._new("work", self.start)
        ended = self._run(whole, self.command)
        assert ended.code == 0, ended.said
        self.steps, self.reference = ended.steps, _content(whole / self.output)
        self.before = _content(self.start / self.output)
        self.result.steps = len(self.steps)

    def _new(self, name: str, source: Path) -> Path:
        place = self.scratch / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place, symlinks=True)
        return place

    def _run(self, place: Path, command: list[str], at: int | None = None, how: str = "kill") -> Ended:
        def enter() -> None:
            os.chdir(place)
            os.environ["SPMCONVERT_CACHE"] = str(place / "cache")

        return run_forked(command, Watch(place, at, how), enter)

    def stop(self, at: int, how: str) -> None:
        """Stop the command at a step, and go on from there in every way."""
        what = f"{how} at {at} ({self.steps[at].name} {self.steps[at].path})"
        place = self._new("work", self.start)
        ended = self._run(place, self.command, at, how)
        if how == "fill":
            self.result.full += 1
            self._check_refused(ended, what)
        else:
            self.result.kills += 1
            if ended.code != KILLED:
                self._wrong(what, f"was not reached: {ended.code} {ended.said[-200:]}")
        self._check_whole(place, what)
        left = self._new("left", place)
        for options in ([], ["--resume"]) if self.resumable else ([],):
            self._go_on(self._new("work", left), options, what)

    def _check_refused(self, ended: Ended, what: str) -> None:
        if ended.code == 0:
            # what could not be removed, or kept for later, is no loss of this run
            return
        if ended.code not in (SPACE, UNWRITABLE) or "Traceback" in ended.said or not ended.line:
            self._wrong(what, f"{ended.code}: {ended.said[-300:]}")

    def _check_whole(self, place: Path, what: str) -> None:
        for part, files in self.sources.items():
            if files_of(place / part) != files:
                self._wrong(what, f"{part} is not what it was")
        if _content(place / self.output) not in (self.before, self.reference, {}):
            self._wrong(what, "there is half an output")

    def _go_on(self, place: Path, options: list[str], what: str) -> None:
        """Repeat the command, and do what it says, until it is content."""
        said = []
        for _ in range(MOST_RUNS):
            ended = self._run(place, [*self.command, *options])
            self.result.runs += 1
            said.append(f"{' '.join(options) or 'again'}: {ended.code} {ended.line}")
            self._check_whole(place, f"{what}; {said[-1]}")
            if ended.code == 0 or "nothing is left to do" in ended.line or "has been finetuned in place" in ended.line:
                break
            if not ended.line or "Traceback" in ended.said or ended.code == 1:
                self._wrong(what, f"{said[-1]} {ended.said[-300:]}")
                return
            options = _advised(ended.line, options)
            if options is None:
                break
        if _content(place / self.output) != self.reference:
            self._wrong(what, " -> ".join(said))
        # a kill right before a working directory would be removed leaves its mark, which is no work
        hidden = [path for path in place.iterdir() if path.name.startswith(".") and path.is_dir()]
        left = [path.name for path in hidden if any(inner.name != "run.json" for inner in path.iterdir())]
        if left:
            self._wrong(what, f"leaves {left}: {' -> '.join(said)}")

    def _wrong(self, what: str, how: str) -> None:
        self.result.wrong.append(f"{what}: {how}")


def _advised(line: str, options: list[str]) -> list[str] | None:
    """The options that an error says to give, or None for none."""
    if "without --resume" in line:
        return []
    if "--resume" in line and "--resume" not in options:
        return ["--resume"]
    if "--force" in line:
        return ["--force"]
    return options if "again" in line else None


def _content(directory: Path) -> dict[str, str]:
    return files_of(directory) if directory.is_dir() else {}


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def _models(base: Path) -> None:
    """A dense model, two conversions of it and a text; the modules of all commands are imported afterwards."""
    from transformers import LlamaForCausalLM

    from tests.conftest import _save, llama_config

    _save(LlamaForCausalLM(llama_config(hidden_size=16, intermediate_size=40, num_hidden_layers=1)), base / "m")
    (base / "t.txt").write_text("\n".join(f"line {number} of a text that is not long " * 3 for number in range(20)))
    for command in (
        ["convert", "m", "-o", "c", *CONVERT],
        ["convert", "m", "-o", "old", *CONVERT[:2], "--stages", "3", *CONVERT[4:]],
        ["finetune", "c", "-o", "tuned", *FINETUNE],
        ["export", "c", "-o", "dense"],
    ):
        ended = run_forked(command, Watch(base), lambda: os.chdir(base))
        assert ended.code == 0, ended.said
        for name in ended.modules:
            _import(name)


def _import(name: str) -> None:
    try:
        __import__(name)
    except Exception:
        return


def _chosen(count: int, most: int | None) -> Iterator[int]:
    """Evenly spaced steps, the first and the last among them."""
    number = count if most is None else min(most, count)
    return iter(sorted({round(index * (count - 1) / max(1, number - 1)) for index in range(number)}))


def run(name: str, base: Path, scratch: Path, most: int | None) -> Result:
    """Stop a command at its steps; at so many of each kind, or at all of them."""
    campaign = Campaign(name, base, scratch)
    for at in _chosen(len(campaign.steps), most):
        campaign.stop(at, "kill")
    writing = [at for at, step in enumerate(campaign.steps) if step.writes and not step.path.endswith(".lock")]
    for index in _chosen(len(writing), most):
        campaign.stop(writing[index], "tear")
    needing = [at for at, step in enumerate(campaign.steps) if not re.search("remove|rmdir", step.name)]
    for index in _chosen(len(needing), most):
        campaign.stop(needing[index], "fill")
    return campaign.result


def main() -> None:
    """Run the campaigns that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("commands", nargs="*", default=list(COMMANDS))
    parser.add_argument("--most", type=int, help="steps of each kind; all without it")
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory) / "base"
        base.mkdir()
        _models(base)
        for name in given.commands:
            began = time.monotonic()
            result = run(name, base, Path(directory) / name, given.most)
            wrong += len(result.wrong)
            print(json.dumps({**vars(result), "seconds": round(time.monotonic() - began, 1)}), flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
