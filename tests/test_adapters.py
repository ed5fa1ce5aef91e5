"""LoRA by PEFT on converted models: by the usual names, trained, saved, merged; and what is refused."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

import spmconvert
from spmconvert.adapters import SPMLoraLinear
from spmconvert.commands.verify import verify
from spmconvert.errors import FitError, OptionError, UnsupportedLayerError

# PEFT asks models for attributes that transformers deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 35).view(2, 16)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted(directory, **options):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": SEVEN, **options})
    model = get_peft_model(spmconvert.load(directory), config)
    return model


def trained(model, steps=3):
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(tuned, 1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


def spm_adapters(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SPMLoraLinear)}


@pytest.mark.parametrize("name", ["lowrank", "spm+lowrank", "sparse24", "mixed"])
def test_the_usual_names_train_save_merge_and_verify(sums, tmp_path, name, caplog):
    model = adapted(sums[name], use_rslora=name == "mixed")
    assert len(spm_adapters(model)) == 9
    before = logits(spmconvert.load(sums[name]))
    assert logits(model).equal(before)
    wanted = logits(trained(model))
    # float32 and another order of the same sums
    close = {"rtol": 0, "atol": 1e-5 * float(wanted.abs().max())}
    assert (wanted - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(spmconvert.load(sums[name]), tmp_path / "adapter")
    assert logits(again).equal(wanted)
    with caplog.at_level(logging.WARNING, "spmconvert.adapters"):
        merged = again.merge_and_unload()
    said = [record.getMessage() for record in caplog.records if record.name == "spmconvert.adapters"]
    assert len(said) == 9
    assert "model.layers.0.mlp.gate_proj: adapter default merged, low rank" in said[0]
    assert "(+2)" in said[0]
    torch.testing.assert_close(logits(merged), wanted, **close)
    merged.save_pretrained(tmp_path / "merged")
    written = json.loads((tmp_path / "merged/config.json").read_text())["quantization_config"]["layers"]
    source = json.loads((sums[name] / "config.json").read_text())["quantization_config"]["layers"]
    assert written.keys() == source.keys()
    for layer, entry in written.items():
        ranks = [next((t["rank"] for t in e["terms"] if t["kind"] == "lowrank"), 0) for e in (source[layer], entry)]
        assert ranks[1] == ranks[0] + 2
    assert logits(spmconvert.load(tmp_path / "merged")).equal(logits(merged))
    if name == "mixed":
        assert not [check for check in verify(tmp_path / "merged") if check.outcome == "FAILED"]


def test_all_linear_takes_the_factors_of_low_rank(sums):
    model = adapted(sums["lowrank"], target_modules="all-linear")
    assert not spm_adapters(model)
    names = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert any("mlp.gate_proj.lowrank.down" in name for name in names)
    wanted = logits(trained(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_merging_is_taken_back_to_the_same_bits(sums):
    model = trained(adapted(sums["spm+lowrank"]))
    model.add_adapter("second", LoraConfig(r=1, target_modules=SEVEN))
    wanted = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mlp." in name}
    model.merge_adapter(["default", "second"])
    layer = spm_adapters(model)["base_model.model.model.layers.0.mlp.gate_proj"]
    assert layer.base_layer.design.term("lowrank").rank == 4 + 2 + 1
    assert all(not parameter.requires_grad for parameter in layer.base_layer.parameters())
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    model.unmerge_adapter()
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in state.items())
    before = logits(spmconvert.load(sums["spm+lowrank"]))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6 * float(before.abs().max()))


def test_half_precision_and_conv1d(gpt2_spm):
    model = spmconvert.load(gpt2_spm, dtype=torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    model = trained(get_peft_model(model, config))
    wanted = logits(model)
    assert wanted.dtype == torch.bfloat16
    assert len(spm_adapters(model)) == 4
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    # a few roundings of bfloat16 a layer
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=2**-5 * float(wanted.abs().max()))


def test_an_adapter_is_injected_without_a_model_of_peft_around_it(sums):
    model = spmconvert.load(sums["lowrank"])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=SEVEN), model)
    assert len(spm_adapters(model)) == 9
    trained(model)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica'"),
    ],
)
def test_what_needs_a_dense_weight_is_refused_by_name(sums, option, named):
    with pytest.raises(OptionError, match=rf"{named} of LoraConfig is not supported beside model.layers.0.mlp.gate_proj"):
        adapted(sums["lowrank"], target_modules=["gate_proj"], **option)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", False])
def test_starts_that_need_none_work(sums, start):
    model = adapted(sums["lowrank"], target_modules=["gate_proj"], init_lora_weights=start)
    assert torch.isfinite(logits(model)).all()


def test_dora_works_on_the_factors_of_low_rank(sums):
    model = adapted(sums["lowrank"], target_modules=["lowrank.down", "lowrank.up"], use_dora=True)
    wanted = logits(trained(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_merge_that_a_layer_cannot_take_is_refused_by_name(sums):
    model = adapted(sums["lowrank"], r=27, target_modules=["gate_proj"])
    with pytest.raises(
        UnsupportedLayerError, match=r"adapter default cannot be merged into model.layers.0.mlp.gate_proj: rank 27 beside"
    ):
        model.merge_and_unload()
    model = adapted(sums["lowrank"], target_modules=["gate_proj"])
    with torch.no_grad():
        next(iter(spm_adapters(model).values())).lora_B["default"].weight[0, 0] = torch.inf
    with pytest.raises(FitError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


ORDERS = """
import importlib.util, os, sys
import importlib, torch, transformers.utils
assert "peft" not in sys.modules
if os.fork() == 0:
    import spmconvert.hf
    os._exit("peft" in sys.modules)
assert os.wait()[1] == 0, "peft is imported without need"
# transformers asks whether it is there before anything imports it
for order in (("spmconvert",), ("peft",), ("spmconvert", "ask")):
    if os.fork() == 0:
        for name in order:
            importlib.util.find_spec("peft") if name == "ask" else importlib.import_module(name)
        from peft import LoraConfig, get_peft_model
        config = LoraConfig(r=2, target_modules=["0"])
        import spmconvert
        model = get_peft_model(torch.nn.Sequential(spmconvert.SPMLinear(8, 8, stages=2)), config)
        os._exit(type(model.base_model.model[0]).__name__ != "SPMLoraLinear")
    assert os.wait()[1] == 0, order
"""


@pytest.mark.filterwarnings("default")
def test_peft_knows_the_layer_whatever_is_imported_first_and_only_then():
    done = subprocess.run([sys.executable, "-c", ORDERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
