"""int8 on top of converted models: what every kind of term computes, what is refused, how it is saved and loaded."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear
from torchao.quantization import Int8WeightOnlyConfig
from torchao.quantization import quantize_ as torchao_quantize_
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import spmconvert
from spmconvert.errors import CheckpointError, OptionError, UnsupportedLayerError
from spmconvert.model.int8 import quantize_linears_, saved_bytes
from spmconvert.model.swap import copy_sharing_tensors
from spmconvert.operator.int8 import INT8_MODES, is_int8, numbers
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.blockdense import BlockDense
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.monarch import Monarch
from spmconvert.operator.terms.sparse24 import Sparse24, Sparse24Module
from spmconvert.operator.terms.spm import Stages
from tests.conftest import SUMS
from tests.support import assert_refused

IN, OUT = 24, 36
MULTIPLIED = {
    "lowrank": [LowRank(IN, OUT, 6)],
    "rank 1": [LowRank(IN, OUT, 1)],
    "monarch": [Monarch(IN, OUT, 2, 3, 4)],
    "one column of blocks": [Monarch(IN, OUT, 4, 1, 1)],
    "blockdense": [BlockDense(IN, OUT, blocks_out=3, rank=5)],
    "sparse24": [Sparse24(IN, OUT)],
    "sparse24 of another width": [Sparse24(22, OUT)],
    "sums": [Monarch(IN, OUT, 2, 3, 4), Sparse24(IN, OUT), LowRank(IN, OUT, 6)],
}
STAGED = {
    "stages": [Stages.from_options(IN, OUT, {})],
    "blocks": [Stages.from_options(IN, OUT, {"block": 4, "stages": 3})],
    "rotation": [Stages.from_options(IN, OUT, {"variant": "rotation"})],
    "a diagonal": [Stages.from_options(IN, OUT, {"stages": 0})],
    "stages and low rank": [Stages.from_options(IN, OUT, {}), LowRank(IN, OUT, 6)],
    "wrapped": [Sparse24.from_options(IN, OUT, {"wrap": True, "wrap_block": 4})],
}


class Model(nn.Module):
    """What quantize_ asks of a model, around one layer."""

    def __init__(self, terms):
        super().__init__()
        self.all_tied_weights_keys = {}
        torch.manual_seed(0)
        self.layer = SPMLinear(terms[0].in_features, OUT, terms=terms)
        self.last = nn.Linear(OUT, 2)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "bias" in name or "lowrank" in name:
                    parameter.normal_()

    def get_output_embeddings(self):
        return self.last


def made(terms, mode, tokens=7):
    """A quantised layer, the one it was, and inputs of more tokens than are few."""
    model = Model(terms).eval()
    before = copy_sharing_tensors(model).layer
    spmconvert.quantize_(model, mode)
    return model.layer, before, torch.randn(tokens, terms[0].in_features)


def rounded(x, weight):
    """x [tokens, ..., inputs] as a dynamic product rounds it, symmetric, with one scale a row; and the tokens [tokens] of
    which nothing lies between two steps, where float32 decides: the largest negative number of a row always does, the
    largest positive one is cut to the last step either way."""
    least, most = (-64, 63) if weight.act_quant_kwargs.reduce_range else (-128, 127)
    scale = (x.abs().amax(-1, keepdim=True) / ((most - least) / 2)).clamp_min(torch.finfo(torch.float32).eps)
    steps = x / scale
    between = ((steps - steps.floor() - 0.5).abs() < 1e-3) & (steps < most)
    return steps.round().clamp(least, most) * scale, ~between.flatten(1).any(1)


@pytest.mark.parametrize("terms", [*MULTIPLIED.values(), *STAGED.values()], ids=[*MULTIPLIED, *STAGED])
@torch.no_grad()
def test_weights_are_rounded_and_nothing_else(terms):
    layer, before, x = made(terms, "int8-weight-only")
    for (name, value), old in zip(layer.named_parameters(), before.parameters(), strict=True):
        if is_int8(value):
            # half a step of the scale
            assert ((numbers(value) - old).abs() <= 0.5001 * value.scale).all(), name
            assert not value.requires_grad
        else:
            # vectors, and columns of one number, have nothing to gain
            assert torch.equal(value, old), name
            assert value.dim() == 1 or 1 in value.shape[1:] or not value.numel(), name
    wanted = linear(x.double(), layer.to_dense().double(), layer.held_bias.double())
    for rows in (x, x[:1], x[None]):
        torch.testing.assert_close(layer(rows).view(-1, OUT), wanted[: rows.view(-1, x.shape[1]).shape[0]].float())


@pytest.mark.parametrize("name", ["lowrank", "monarch", "blockdense", "sparse24"])
@torch.no_grad()
def test_dynamic_products_are_those_of_rounded_inputs(name):
    layer, _, x = made(MULTIPLIED[name], "int8-dynamic", tokens=200)
    (term,) = layer.term_modules
    inner_clear = True
    if name == "lowrank":
        inputs, clear = rounded(x, term.down.weight)
        inner, inner_clear = rounded(inputs @ numbers(term.down.weight).t(), term.up.weight)
        wanted = inner @ numbers(term.up.weight).t() + term.up.bias
    elif name == "sparse24":
        inputs, clear = rounded(x, term.values)
        wanted = inputs @ term.matrix().t() + layer.bias
    else:
        blocks, integers = term.blocks(), term.term
        inputs, clear = rounded(x.unflatten(1, (integers.blocks_in, -1)), term.first)
        inner = torch.einsum("iajp,tip->tjia", blocks.first, inputs).flatten(2)
        inner, inner_clear = rounded(inner, term.second)
        inner = inner.unflatten(2, (integers.blocks_in, integers.rank))
        wanted = torch.einsum("jqia,tjia->tjq", blocks.second, inner).flatten(1) + layer.bias
    # integers are multiplied exactly; what is left is rounding of float32
    compared = clear & inner_clear
    assert compared.sum() > 5
    torch.testing.assert_close(layer(x)[compared], wanted[compared], rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("name", MULTIPLIED)
@torch.no_grad()
def test_dynamic_is_close_to_what_it_was(name):
    layer, before, x = made(MULTIPLIED[name], "int8-dynamic")
    found, wanted = layer(x), before(x)
    # a step of the inputs and of the weights, each 1/127 of the largest, through at most two products
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert not torch.equal(found, layer.eval()(x) * 0 + wanted)
    torch.testing.assert_close(layer(x), found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["stages", "wrapped"])
def test_dynamic_refuses_stages_and_changes_nothing(name):
    model = Model(STAGED[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnsupportedLayerError, match=r"layer layer has .*; take int8-weight-only, or convert without"):
        spmconvert.quantize_(model, "int8-dynamic")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_refused_by_name(checkpoints, sums, monkeypatch):
    dense = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    with pytest.raises(OptionError, match="no converted layer"):
        spmconvert.quantize_(dense, "int8-dynamic")
    model = spmconvert.load(sums["sparse24"])
    with pytest.raises(OptionError, match="int8-weight-only, int8-dynamic"):
        spmconvert.quantize_(model, "int4")
    monkeypatch.setattr(Sparse24Module, "int8_factors", None)
    with pytest.raises(UnsupportedLayerError, match="has a sparse24 term, which has no int8 form"):
        spmconvert.quantize_(model, "int8-weight-only")
    monkeypatch.undo()
    spmconvert.quantize_(model, "int8-weight-only")
    with pytest.raises(OptionError, match="is quantised already"):
        spmconvert.quantize_(model, "int8-weight-only")
    with pytest.raises(ValueError, match="half"):
        model.half()
    assert not model.hf_quantizer.is_trainable


def test_torchao_is_asked_for_by_name(sums, tmp_path, monkeypatch):
    model = spmconvert.load(sums["lowrank"])
    spmconvert.quantize_(model, "int8-weight-only")
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(OptionError, match=r"pip install 'spmconvert\[quant\]'"):
        spmconvert.quantize_(spmconvert.load(sums["lowrank"]), "int8-weight-only")
    with pytest.raises(OptionError, match=r"pip install 'spmconvert\[quant\]'"):
        spmconvert.load(tmp_path)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 19).view(2, 8))[0]


CASES = [
    *((name, mode) for name in ("lowrank", "sparse24", "sparse24+lowrank") for mode in INT8_MODES),
    *(
        (name, "int8-weight-only")
        for name in ("mixed", "wrapped", "spm+lowrank", "gpt2", "llama-tied", "llama-bf16", "bert")
    ),
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_quantised_model_is_saved_and_loaded(converted, sums, tmp_path, name, mode):
    source = sums[name] if name in SUMS else converted[name]
    model = spmconvert.load(source, dtype="auto")
    floating = logits(model)
    left = spmconvert.quantize_(model, mode)
    found = logits(model)
    assert 0 < (found - floating).norm() < 0.1 * floating.norm()
    assert all("embed" in key or "lm_head" in key or "wte" in key or "wpe" in key for key in left), left
    model.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    assert not list((tmp_path / "a").glob("*.bin"))
    for file in ("a", "b"):
        loaded = spmconvert.load(tmp_path / file, dtype="auto")
        torch.testing.assert_close(logits(loaded), found, rtol=0, atol=0)
        assert json.loads((tmp_path / file / "config.json").read_text())["quantization_config"]["int8"] == mode
        loaded.save_pretrained(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    stored = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    whole = load_file(source / "model.safetensors")
    assert stored == sum(tensor.numel() * tensor.itemsize for tensor in whole.values()) - saved_bytes(model)
    loaded.dequantize()
    assert not any(isinstance(module, SPMLinear) for module in loaded.modules())
    assert not any(is_int8(parameter) for parameter in loaded.parameters())
    # weights are what they were rounded to; dynamic products round activations as well
    torch.testing.assert_close(
        logits(loaded), found, rtol=0, atol=(0.05 if "dynamic" in mode else 2e-2) * found.abs().max()
    )


def test_another_head_loads_the_same_base(converted, tmp_path):
    model = spmconvert.load(converted["gpt2"])
    spmconvert.quantize_(model, "int8-weight-only")
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    model.save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        states = [each.eval().transformer(ids)[0] for each in (model, other)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_commands_refuse_a_quantised_checkpoint(sums, tmp_path, run):
    model = spmconvert.load(sums["lowrank"])
    spmconvert.quantize_(model, "int8-weight-only")
    shutil.copytree(sums["lowrank"], tmp_path / "q")
    model.save_pretrained(tmp_path / "q")
    assert_refused(run("export", tmp_path / "q", "-o", tmp_path / "d"), CheckpointError, "int8-weight-only", "made from")


def test_what_torchao_itself_quantised_runs_and_is_not_saved(sums, tmp_path):
    model = spmconvert.load(sums["sparse24+lowrank"])
    before = logits(model)
    torchao_quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    assert 0 < (logits(model) - before).norm() < 0.05 * before.norm()
    with pytest.raises(CheckpointError, match="leaves terms of converted layers out"):
        model.save_pretrained(tmp_path / "q")


@pytest.mark.parametrize("mode", INT8_MODES)
def test_a_dense_model_is_quantised_on_a_copy(checkpoints, mode):
    dense = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"])
    before, saved = logits(dense), {key: value.clone() for key, value in dense.state_dict().items()}
    copy = copy_sharing_tensors(dense)
    quantize_linears_(copy, mode)
    assert 0 < (logits(copy) - before).norm() < 0.1 * before.norm()
    assert saved_bytes(copy) > 0
    torch.testing.assert_close(logits(dense), before, rtol=0, atol=0)
    assert all(torch.equal(value, saved[key]) for key, value in dense.state_dict().items())
