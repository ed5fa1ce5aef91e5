"""Everything in the package that reads a file, each with a good content as a structure and how that is written and read."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from spmconvert.budget import cache as curves
from spmconvert.budget.curves import _known
from spmconvert.budget.spend import Spent
from spmconvert.budget.times import TimeTable
from spmconvert.checkpoint.checksums import read_checksums
from spmconvert.checkpoint.converted import open_converted
from spmconvert.checkpoint.headers import read_headers
from spmconvert.checkpoint.parts import Parts
from spmconvert.checkpoint.places import finish_commit
from spmconvert.checkpoint.reader import open_checkpoint
from spmconvert.checkpoint.unfinished import find_unfinished
from spmconvert.checkpoint.writer import _read_fingerprint
from spmconvert.commands.convert import convert, open_plan
from spmconvert.commands.report import _layer_errors_on, _training, report
from spmconvert.data.documents import read_documents
from spmconvert.data.training import _kept
from spmconvert.distill.runlog import RunLog, check_log
from spmconvert.distill.state import State, read_snapshot, restore
from spmconvert.distill.stored import StoredLogits
from spmconvert.fit.layer import stored_record
from spmconvert.model.swap import layer_from_spec
from spmconvert.operator.triton.tuning import _read
from spmconvert.recipe.loading import load_recipe, parse_assignment, recipe_from_keywords, recorded_recipe
from spmconvert.recipe.recipe import Recipe, Training
from spmconvert.reporting.schema import read_report

READERS = (
    "config", "layer map", "provenance", "header", "index", "modules", "recipe", "assignment", "report", "checksums",
    "curves", "times", "tiles", "tokens", "documents", "run log", "state", "choice", "part", "run", "commit", "logits",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """One of them.

    Attributes:
        name: as on the command line.
        good: a content that it reads.
        write: puts a content where it is read.
        read: reads it, and asks of it what commands ask.
    """

    name: str
    good: Any
    write: Callable[[Any], object]
    read: Callable[[], object]


def as_json(file: Path) -> Callable[[Any], object]:
    """Writes a structure as JSON."""
    return lambda content: file.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


def as_toml(value: Any, *, top: bool = True) -> str:
    """A structure as TOML: top-level keys one a line, everything inside of them in line."""
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)} = {as_toml(inner, top=False)}" for key, inner in value.items()]
        return "\n".join(pairs) if top else f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(as_toml(inner, top=False) for inner in value)}]"
    if isinstance(value, float):
        return repr(value)
    # None is no value of TOML, and its parser refuses it
    return json.dumps(value)


def make_readers(root: Path) -> dict[str, Reader]:
    """All readers, on files of their own below a folder."""
    from transformers import LlamaForCausalLM

    from tests.conftest import _save, llama_config

    _save(LlamaForCausalLM(llama_config(hidden_size=16, intermediate_size=40, num_hidden_layers=1)), root / "dense")
    convert(root / "dense", root / "spm", stages=2, layers="0", **{"fit.iterations": 1})
    makers = (_checkpoint_readers, _converted_readers, _recipe_readers, _cache_readers, _run_readers)
    found = [reader for make in makers for reader in make(root)]
    assert {reader.name for reader in found} == set(READERS)
    return {reader.name: reader for reader in found}


def _checkpoint_readers(root: Path) -> list[Reader]:
    dense = root / "dense"
    config, single, sharded = (shutil.copytree(dense, root / name) for name in ("config", "single", "sharded"))
    raw = (dense / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    shard = "model-00001-of-00001.safetensors"
    (sharded / "model.safetensors").rename(sharded / shard)
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling" / "config.json").write_text("{}")
    (dense / "modules.json").write_text("[]")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "t"}, {"idx": 1, "name": "1", "path": "1_Pooling", "type": "p"}]

    def write_header(content: Any) -> None:
        encoded = json.dumps(content).encode()
        (single / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])

    return [
        Reader(
            "config",
            json.loads((dense / "config.json").read_text()),
            as_json(config / "config.json"),
            lambda: open_plan(str(config), Recipe(design={"stages": 2})),
        ),
        Reader("header", header, write_header, lambda: read_headers(single)),
        Reader(
            "index",
            {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)},
            as_json(sharded / "model.safetensors.index.json"),
            lambda: read_headers(sharded),
        ),
        Reader("modules", modules, as_json(dense / "modules.json"), lambda: open_checkpoint(str(dense)).companion_files()),
    ]


def _converted_readers(root: Path) -> list[Reader]:
    spm = root / "spm"
    mapped, recorded = (shutil.copytree(spm, root / name) for name in ("mapped", "recorded"))
    config = json.loads((spm / "config.json").read_text())
    provenance = json.loads((spm / "spm.json").read_text())
    point = {"step": 1, "tokens": 2, "held_out_loss": 1.0}
    done = {"steps": 1, "tokens": 2, "objective": "logits", "start_loss": 1.0, "best_loss": 1.0, "stopped": "", "seed": 0}
    provenance["finetune"] = [{**done, "recipe": {"train": "spm"}, "data_sha256": "x", "history": [point]}]

    def read_map() -> None:
        for spec in open_converted(mapped).layers.values():
            layer_from_spec(spec, device="meta")

    def read_provenance() -> None:
        converted = open_converted(recorded)
        assert converted.kept >= 0
        recorded_recipe(converted.provenance["recipe"])
        _layer_errors_on(converted)
        _training(SimpleNamespace(converted=converted))  # type: ignore[arg-type]

    lines = (spm / "checksums.sha256").read_text().split("\n")
    return [
        Reader("layer map", config["quantization_config"], lambda map_: as_json(mapped / "config.json")(
            {**config, "quantization_config": map_}), read_map),
        Reader("provenance", provenance, as_json(recorded / "spm.json"), read_provenance),
        Reader("checksums", [line.split("  ") for line in lines], lambda content: (spm / "checksums.sha256").write_text(
            "\n".join("  ".join(line) for line in content)), lambda: read_checksums(spm)),
        Reader("report", report(spm, data=None, seconds=0).model_dump(mode="json"), as_json(root / "report.json"),
               lambda: read_report(root / "report.json")),
    ]  # fmt: skip


def _recipe_readers(root: Path) -> list[Reader]:
    good = Recipe(
        design={"terms": [{"kind": "lowrank", "rank": 3}]}, overrides=[{"pattern": "*.x", "stages": 3}], layers="0-2"
    ).model_dump(mode="json", exclude_none=True)
    given: list[str] = []

    def read_assignment() -> None:
        key, value = parse_assignment(given[0])
        recipe_from_keywords({key: value})

    return [
        Reader("recipe", good, lambda content: (root / "r.toml").write_text(as_toml(content), encoding="utf-8"),
               lambda: load_recipe(root / "r.toml", {})),
        Reader("assignment", ["fit", "iterations", 5], lambda content: given.__setitem__(slice(None), [
            f"{'.'.join(map(str, content[:-1]))}={as_toml(content[-1], top=False)}"]), read_assignment),
        Reader("documents", [{"text": "a line"}, {"text": "another"}], lambda content: (root / "t.jsonl").write_text(
            "\n".join(json.dumps(line) for line in content)), lambda: read_documents(root / "t.jsonl")),
    ]  # fmt: skip


def _cache_readers(root: Path) -> list[Reader]:
    _, plan, _ = open_plan(str(root / "dense"), Recipe(design={"stages": 2}))
    layer = plan.layers[0]
    files = {part: root / f"{part}.json" for part in (curves.LOW_RANK, curves.TERMS, curves.RESPONSE)}
    cache = SimpleNamespace(files=lambda _: files, structures=("lowrank", "sparse24"))
    known = {
        curves.LOW_RANK: {"ranks": [1, 2], "errors": [1.0, 0.5], "losses": [1.0, 0.5]},
        curves.TERMS: [{"terms": [{"kind": "lowrank", "rank": 2}], "error": 0.5, "loss": 0.5}],
        curves.RESPONSE: [[0.1, 0.2], [0.3, 0.4]],
    }

    def write_curves(content: Any) -> None:
        for part, file in files.items():
            file.write_text(json.dumps(content[part]))

    def read_curves() -> None:
        curve = _known(cache, layer)  # type: ignore[arg-type]
        for candidate in curve.candidates:
            candidate.design(layer.target.in_features, layer.target.out_features)

    table = TimeTable(16, "cpu")
    table._file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"ids": [1, 2, 3, 4], "ends": [2, 4], "dtypes": ["int32", "int64"]}

    def write_tokens(content: Any) -> None:
        for name, dtype in zip(("ids", "ends"), content["dtypes"], strict=True):
            np.save(root / f"{name}.npy", np.array(content[name], dtype=dtype), allow_pickle=False)

    return [
        Reader("curves", known, write_curves, read_curves),
        Reader("times", {"dense 4 4": 0.5}, as_json(table._file), lambda: TimeTable(16, "cpu").dense(4, 4)),
        Reader("tiles", {"tiles": [[1]], "milliseconds": [0.5, 0.25]}, as_json(root / "tiles.json"),
               lambda: min(_read(root / "tiles.json", 2) or [0.0])),
        Reader("tokens", arrays, write_tokens, lambda: _kept(root)),
    ]  # fmt: skip


def _run_readers(root: Path) -> list[Reader]:
    _, plan, _ = open_plan(str(root / "dense"), Recipe(design={"stages": 2}))
    trained = {"w": torch.nn.Parameter(torch.zeros(2))}
    ones = {"w": [1.0, 1.0]}
    state = {**vars(State(step=1)), "best": ones, "average": {}, "best_loss": 1.0}
    kept = {"state": state, "parameters": ones, "moments": {"w": {"step": [1.0], "exp_avg": [0.0, 0.0]}}}

    def tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tensors(inner) for key, inner in value.items()}
        return torch.tensor(value) if isinstance(value, list) and value and isinstance(value[0], float) else value

    def read_state() -> None:
        optimizer = torch.optim.AdamW(trained.values())
        restore(read_snapshot(root / "state.bin"), State(), trained, optimizer)

    record = json.loads((root / "spm" / "spm.json").read_text())["layers"][0]
    parts = Parts(root / ".o.partial" / "layers")
    (root / ".o.partial").mkdir()
    (root / ".o.partial" / "run.json").write_text('{"fingerprint": "x"}')

    def read_part() -> None:
        found = parts.record("x")
        assert found is not None
        stored_record(found)
        find_unfinished(root / "o")

    picked = [{"terms": [{"kind": "lowrank", "rank": 2}], "error": 0.5, "loss": 0.5}, *[None] * (len(plan.layers) - 1)]
    choice = {"chosen": [0] * len(plan.layers), "cost": 1, "loss": 0.5, "bound": 0.5, "limit": None}
    chosen = {
        "allocation": {"choice": choice, "picked": picked, "dropped": [0, 0]},
        "speedup": {"predicted": None, "measured": None},
        "instead": False,
    }
    commit = root / ".c.partial" / "commit.json"

    def write_commit(content: Any) -> None:
        # a commit that is finished takes its folder away
        commit.parent.mkdir(exist_ok=True)
        as_json(commit)(content)

    (root / "log").mkdir()
    log = RunLog(root / "log" / "o", SimpleNamespace(log_with=[], is_main_process=True), Training(), kept, lambda _: None)

    def write_log(content: Any) -> None:
        (root / "log" / "o.jsonl").write_text("\n".join(json.dumps(line) for line in content))

    def read_log() -> None:
        check_log(root / "log" / "o")
        with log:
            pass

    return [
        Reader("state", kept, lambda content: torch.save(tensors(content), root / "state.bin"), read_state),
        Reader("choice", chosen, as_json(root / "choice.json"),
               lambda: Spent.from_json(plan, (root / "choice.json").read_bytes())),
        Reader("part", record, lambda content: parts.store("x", {"w": torch.zeros(1)}, content), read_part),
        Reader("run", {"fingerprint": "x"}, as_json(root / "run.json"), lambda: _read_fingerprint(root / "run.json")),
        Reader("commit", {"aside": ".c.0123456789abcdef.old"}, write_commit,
               lambda: finish_commit(root / "c")),
        Reader("run log", [{"log": "spmconvert finetune"}, {"step": 1}, {"step": 2}], write_log, read_log),
        _logits_reader(root),
    ]  # fmt: skip


def _logits_reader(root: Path) -> Reader:
    folder = root / "logits"
    folder.mkdir()
    good = {
        "about": {"format_version": 1, "teacher_sha256": "t"},
        "words": [[1, 2], [3, 4]],
        "log_probabilities": [[0.5, 0.5], [0.5, 0.5]],
        "ends": [1, 2],
        "keys": [[1, 2], [3, 4]],
    }
    dtypes = {"words": "int32", "log_probabilities": "float16", "ends": "int64", "keys": "uint8"}

    def write(content: Any) -> None:
        (folder / "about.json").write_text(json.dumps(content["about"]))
        for name, dtype in dtypes.items():
            np.save(folder / f"{name}.npy", np.array(content[name], dtype=dtype), allow_pickle=False)

    return Reader("logits", good, write, lambda: StoredLogits(folder, "t"))
