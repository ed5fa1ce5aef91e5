"""Stacked experts in a checkpoint and in a loaded model."""

import json
import shutil
import subprocess
import sys

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import spmconvert
from spmconvert.commands.report import report
from spmconvert.commands.verify import verify
from spmconvert.errors import CheckpointError, OptionError
from spmconvert.model.stacked_experts import StackedExperts, is_converted
from spmconvert.model.stacked_layer import StackedLayer
from tests.commands.test_experts import FAMILIES, built, logits
from tests.conftest import _save
from tests.support import QUICK

LOW_RANK = {"stages": 0, "rank": 8}
DESIGNS = {
    "lowrank": LOW_RANK,
    "stages": {"stages": 3, "rank": 2},
    "sparse24+lowrank": {"design.terms": [{"kind": "sparse24"}, {"kind": "lowrank", "rank": 2}]},
    "down alone": {**LOW_RANK, "targets": "*.experts.*.down"},
}
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return _save(built(FAMILIES["olmoe"]).eval(), tmp_path_factory.mktemp("stacked") / "olmoe")


@pytest.fixture(scope="module")
def stacked(source, tmp_path_factory):
    """Conversions by name, each made when it is first asked for."""
    root = tmp_path_factory.mktemp("conversions")

    class Conversions(dict):
        def __missing__(self, name):
            options = {"targets": "*.experts.*", "allow_growth": True, **DESIGNS[name], **QUICK}
            spmconvert.convert(source, root / name, **options)
            self[name] = root / name
            return self[name]

    return Conversions()


def test_one_tensor_a_parameter_and_projection(stacked):
    shapes = {
        name.removeprefix(f"{EXPERTS}."): tuple(tensor.shape)
        for name, tensor in load_file(stacked["lowrank"] / "model.safetensors").items()
        if name.startswith(EXPERTS)
    }
    assert shapes == {
        "gate_up.weight": (5, 1, 1, 1),
        "gate_up.lowrank.down.weight": (5, 8, 32),
        "gate_up.lowrank.up.weight": (5, 96, 8),
        "down.weight": (5, 1, 1, 1),
        "down.lowrank.down.weight": (5, 8, 48),
        "down.lowrank.up.weight": (5, 32, 8),
        "down_proj": (1, 1, 1),
    }
    config = json.loads((stacked["lowrank"] / "config.json").read_text())
    entries = config["quantization_config"]["layers"]
    assert len(entries) == 4
    assert entries[f"{EXPERTS}.down"]["experts"] == 5
    records = json.loads((stacked["lowrank"] / "spm.json").read_text())["layers"]
    assert {record["name"] for record in records} >= {f"{EXPERTS}.{index}.down" for index in range(5)}


def test_what_is_left_dense_is_stacked_beside_it(source, stacked):
    tensors = load_file(stacked["down alone"] / "model.safetensors")
    before = load_file(source / "model.safetensors")
    gate, up = (
        torch.stack([before[f"{EXPERTS}.{index}.{projection}.weight"] for index in range(5)])
        for projection in ("gate_proj", "up_proj")
    )
    torch.testing.assert_close(tensors[f"{EXPERTS}.gate_up.weight"], torch.cat([gate, up], 1), rtol=0, atol=0)
    outcomes = {check.name: check.outcome for check in verify(stacked["down alone"])}
    assert outcomes["untouched tensors"] == "ok"


def test_verify_finds_a_change_of_one_expert_that_was_left_dense(stacked, tmp_path):
    from safetensors.torch import save_file

    out = tmp_path / "o"
    shutil.copytree(stacked["down alone"], out)
    tensors = load_file(out / "model.safetensors")
    tensors[f"{EXPERTS}.gate_up.weight"][3, 0, 0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    found = {check.name: check for check in verify(out)}["untouched tensors"]
    assert found.outcome == "FAILED"
    assert f"{EXPERTS}.gate_up.weight" in found.detail


@pytest.mark.parametrize("name", DESIGNS)
def test_experts_run_one_after_the_other_or_together(stacked, name):
    model = spmconvert.load(stacked[name]).train()
    tokens = torch.arange(3, 40)[None]
    found = []
    for implementation in ("grouped_mm", "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        found.append([output.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(*found)


def test_what_the_model_says_decides_how_experts_run(stacked, monkeypatch):
    model = spmconvert.load(stacked["lowrank"]).eval()
    calls = []
    run = StackedLayer._one_by_one

    def noted(self, *arguments):
        calls.append(self)
        return run(self, *arguments)

    monkeypatch.setattr(StackedLayer, "_one_by_one", noted)
    logits(model)
    assert not calls
    model.set_experts_implementation("eager")
    logits(model)
    assert len(calls) == 4


@pytest.mark.parametrize("name", DESIGNS)
def test_device_maps_and_offloaded_parts(stacked, tmp_path, name):
    expected = logits(spmconvert.load(stacked[name]).eval())
    beside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1"), "cpu")
    for places in ("auto", {**beside, "model.layers.0": "disk"}):
        model = AutoModelForCausalLM.from_pretrained(stacked[name], device_map=places, offload_folder=tmp_path / "f").eval()
        for _ in range(2):
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    # what is fetched for a call is not kept after it
    assert not any(module._cache for module in model.model.layers[0].modules() if isinstance(module, StackedLayer))


@pytest.mark.parametrize("name", ["lowrank", "down alone"])
def test_a_model_of_the_config_alone_is_filled(stacked, name):
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(stacked[name]))
    replaced = spmconvert.swap_(model)
    assert f"{EXPERTS}.down" in replaced
    model.tie_weights()
    model = accelerate.load_checkpoint_and_dispatch(model, stacked[name], device_map={"": "cpu"})
    expected = logits(spmconvert.load(stacked[name]).eval())
    torch.testing.assert_close(logits(model.eval()), expected, rtol=0, atol=0)


def test_experts_of_a_model_with_memory_start_differently(stacked):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(stacked["lowrank"]))
    spmconvert.swap_(model)
    factor = model.get_submodule(EXPERTS).down.lowrank.up.weight
    assert not factor[0].equal(factor[1])


@pytest.mark.parametrize(("name", "mode"), [(name, "int8-weight-only") for name in DESIGNS] + [("lowrank", "int8-dynamic")])
def test_experts_in_int8(stacked, tmp_path, name, mode):
    model = spmconvert.load(stacked[name]).eval()
    before = logits(model)
    assert not [left for left in spmconvert.quantize_(model, mode) if ".experts." in left]
    after = logits(model)
    assert 0 < (after - before).norm() < 0.05 * before.norm()
    model.save_pretrained(tmp_path / "q")
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (stacked[name], tmp_path / "q")]
    assert sizes[1] < sizes[0]
    again = spmconvert.load(tmp_path / "q").eval()
    torch.testing.assert_close(logits(again), after, rtol=0, atol=0)
    assert not any(map(is_converted, again.dequantize().modules()))


def test_a_dtype_that_a_recipe_names(source, tmp_path):
    spmconvert.convert(source, tmp_path / "o", targets="*.experts.*", dtype="bfloat16", **LOW_RANK, **QUICK)
    model = spmconvert.load(tmp_path / "o").eval()
    experts = model.get_submodule(EXPERTS)
    assert {parameter.dtype for parameter in experts.parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()


def test_parallel_plans_lose_what_was_replaced(stacked):
    model = spmconvert.load(stacked["lowrank"])
    plan = {f"model.layers.*.mlp.experts{key}": "x" for key in ("", ".gate_up_proj", ".down_proj")}
    plan["model.layers.*.self_attn.q_proj"] = "colwise"
    model.hf_quantizer.update_parallel_plan(model, plan)
    assert list(plan) == ["model.layers.*.self_attn.q_proj"]


def test_no_conversion_of_transformers_takes_the_names():
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = [
        entry
        for entries in conversion_mapping._build_checkpoint_conversion_mapping().values()
        for entry in entries
        if isinstance(entry, WeightConverter)
    ]
    assert len(converters) > 20
    parts = (
        "weight",
        "bias",
        "lowrank.down.weight",
        "lowrank.up.weight",
        "lowrank.up.bias",
        "spm.weight",
        "sparse24.values",
    )
    places = ("mlp.experts", "block_sparse_moe.experts", "feed_forward.experts", "mixer.experts", "moe.experts", "experts")
    for place in places:
        for projection in ("gate_up", "up", "down"):
            for part in parts:
                name = f"model.layers.3.{place}.{projection}.{part}"
                assert all(entry.rename_source_key(name)[1] is None for entry in converters), name


def test_stock_transformers_refuses_what_save_pretrained_wrote(stacked, tmp_path):
    spmconvert.load(stacked["lowrank"]).save_pretrained(tmp_path / "o")
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'o')!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode
    assert "down_proj" in run.stderr


def changed_map(directory, out, change):
    shutil.copytree(directory, out)
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"]["layers"])
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_layer_map_from_before_experts_were_stacked_is_refused(stacked, tmp_path):
    def one_an_expert(layers):
        for entry in list(layers):
            old = layers.pop(entry)
            around, _, projection = entry.rpartition(".")
            layers.update({f"{around}.{index}.{projection}": {**old} for index in range(old.pop("experts"))})

    out = changed_map(stacked["lowrank"], tmp_path / "o", one_an_expert)
    with pytest.raises(CheckpointError, match="before experts were stacked; convert the source again"):
        spmconvert.load(out)
    assert "FAILED" in {check.outcome for check in verify(out)}


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (4, "4 experts for .*, and the model has 5"),
        (7, "7 experts"),
        (0, "at least 1"),
        (1 << 40, "at most"),
        ("5", "integer"),
    ],
)
def test_another_number_of_experts_is_refused(stacked, tmp_path, count, message):
    out = changed_map(stacked["lowrank"], tmp_path / "o", lambda layers: layers[f"{EXPERTS}.down"].update(experts=count))
    with pytest.raises(CheckpointError, match=message):
        spmconvert.load(out)


def test_experts_of_several_designs_are_refused(source, tmp_path):
    overrides = [{"pattern": "*.experts.2.down", "rank": 4}]
    with pytest.raises(OptionError, match=r"experts\.0\.down would be rank 8 .*experts\.2\.down rank 4"):
        spmconvert.convert(source, tmp_path / "o", targets="*.experts.*", overrides=overrides, **LOW_RANK, **QUICK)


def test_adapters_are_refused_by_name(stacked):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(spmconvert.load(stacked["lowrank"]), LoraConfig(r=2, target_modules=["gate_up"]))


def test_biases_that_refinement_changed_beside_replaced_projections(text, tmp_path):
    source = _save(built(FAMILIES["gpt-oss"]).eval(), tmp_path / "m")
    options = {"calib": text, **LOW_RANK, **QUICK, "fit.refine": 1}
    for targets, refined in (("*.experts.*.down", f"{EXPERTS}.gate_up.bias"), ("attn", None)):
        out = tmp_path / f"o{len(targets)}"
        spmconvert.convert(source, out, targets=targets, **options)
        named = json.loads((out / "spm.json").read_text())["refined"]["tensors"]
        assert [name for name in named if EXPERTS in name] == ([] if refined is None else [refined])
        assert set(named) <= set(load_file(out / "model.safetensors"))
        assert {check.outcome for check in verify(out)} <= {"ok", "skipped"}


def test_a_report_counts_every_expert(stacked, text):
    found = report(stacked["lowrank"], data=text, seconds=0.01, rows=8)
    replaced = found.quantity("parameters", "replaced layers")
    assert replaced.dense == 2 * 5 * (32 * 96 + 48 * 32)
    assert replaced.converted == 2 * 5 * 8 * (32 + 96 + 48 + 32)
    met = found.quantity("parameters that a token meets", "replaced layers")
    assert met.converted == replaced.converted * 2 // 5
    model = transformers.AutoModelForCausalLM.from_pretrained(stacked["lowrank"])
    whole = found.quantity("parameters", "whole model")
    assert whole.converted == sum(parameter.numel() for parameter in model.parameters())
    assert isinstance(model.get_submodule(EXPERTS), StackedExperts)
