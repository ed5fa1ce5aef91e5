"""The layer map: what an entry holds, what is refused, and that older formats are named."""

import json
import shutil
import subprocess
import sys

import pytest

from spmconvert.checkpoint.manifest import FORMAT_VERSION, LayerSpec, check_format_version, quantization_config
from spmconvert.errors import CheckpointError
from spmconvert.model.swap import layer_from_spec
from spmconvert.operator.design import Design, staged_design
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.sparse24 import Sparse24
from tests.support import assert_refused

DESIGNS = {
    "stages": staged_design(24, 40, 3, "general", 2),
    "rotation": staged_design(24, 40, variant="rotation"),
    "lowrank": Design(24, 40, (LowRank(24, 40, 5),)),
    "stages+lowrank": staged_design(24, 40, rank=4),
    "sparse24": Design(22, 40, (Sparse24(22, 40),)),
    "wrapped": Design(24, 40, (Sparse24(24, 40, True, 4, 2), LowRank(24, 40, 1))),
}
ENTRY = {
    "in": 24,
    "out": 40,
    "terms": [{"kind": "lowrank", "rank": 5}],
    "bias": True,
    "fan_in_fan_out": False,
    "dtype": None,
}


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_an_entry_is_plain_json_and_is_read_back(design):
    spec = LayerSpec(design, bias=True, fan_in_fan_out=True, dtype="bfloat16")
    entry = json.loads(json.dumps(quantization_config({"a": spec})))["layers"]["a"]
    assert list(entry) == ["in", "out", "terms", "bias", "fan_in_fan_out", "dtype"]
    assert all(isinstance(term["kind"], str) for term in entry["terms"])
    assert LayerSpec.from_json("a", entry) == spec


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_sizes_are_those_of_the_layer(design, bias):
    spec = LayerSpec(design, bias)
    layer = layer_from_spec(spec)
    assert spec.parameter_count() == sum(parameter.numel() for parameter in layer.parameters())
    for item in (2, 4):
        stored = (tensor.numel() * (item if tensor.is_floating_point() else 1) for tensor in layer.state_dict().values())
        assert spec.stored_bytes(item) == sum(stored)
    assert (design.bias_name in layer.state_dict()) == bias


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 3}, "it needs"),
        ({"stages": 3, "variant": "general"}, "it needs"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"fan_in_fan_out": "no"}, "fan_in_fan_out 'no'"),
        ({"in": 0}, "in is 0"),
        ({"out": True}, "out is True"),
        ({"terms": None}, "terms are None"),
        ({"terms": []}, "at least one"),
        ({"terms": ["lowrank"]}, "needs a table with a kind"),
        ({"terms": [{"rank": 5}]}, "needs a table with a kind"),
        ({"terms": [{"kind": "dense"}]}, "no kind of term 'dense'"),
        ({"terms": [{"kind": "lowrank"}]}, "lowrank term has"),
        ({"terms": [{"kind": "lowrank", "rank": 5, "alpha": 2}]}, "lowrank term has"),
        ({"terms": [{"kind": "lowrank", "rank": 25}]}, "at most"),
        ({"terms": [{"kind": "lowrank", "rank": 1}, {"kind": "lowrank", "rank": 2}]}, "one of a kind"),
        ({"terms": [{"kind": "sparse24"}]}, "sparse24 term has"),
    ],
    ids=str,
)
def test_entries_that_describe_no_layer(changes, words):
    LayerSpec.from_json("a", ENTRY)
    with pytest.raises(CheckpointError, match=words) as refused:
        LayerSpec.from_json("a", {**ENTRY, **changes})
    assert "layer a " in str(refused.value)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (1, "convert its source again"),
        (3, "upgrade spmconvert"),
        (None, "format_version None"),
        ("2", "format_version '2'"),
    ],
)
def test_other_formats_are_refused(version, words):
    assert FORMAT_VERSION == 2
    with pytest.raises(CheckpointError, match=words):
        check_format_version(version)
    check_format_version(FORMAT_VERSION)


FORMER = {"in": 32, "out": 128, "n": 128, "stages": 7, "variant": "general", "block": 1, "rank": 0, "bias": True}


@pytest.mark.parametrize("command", ["finetune", "report", "export"])
def test_a_checkpoint_of_the_first_format_is_refused_in_one_line(converted, text, tmp_path, run, command):
    shutil.copytree(converted["gpt2"], tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    layers = dict.fromkeys(config["quantization_config"]["layers"], FORMER)
    config["quantization_config"] |= {"format_version": 1, "layers": layers}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    options = ["--data", text] if command == "finetune" else []
    result = run(command, tmp_path / "old", "-o", tmp_path / "new", *options)
    assert_refused(result, CheckpointError, "format_version 1", "convert its source again")
    assert not (tmp_path / "new").exists()


def test_the_layer_map_is_read_without_torch():
    code = "import sys, spmconvert.checkpoint.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
