"""A block is trained towards the dense one's output as the next block reads it, on what the converted model feeds it."""

import copy

import pytest
import torch
from transformers import BertModel, GPT2LMHeadModel, LlamaForCausalLM

from spmconvert.data.calibration import CalibrationRows
from spmconvert.data.tokens import padded_batch
from spmconvert.fit import blocks, refine
from spmconvert.fit.refine import refine_
from spmconvert.fit.streams import Streams
from spmconvert.model.chain import chain_through
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import LowRank
from tests.conftest import VOCABULARY, bert_config, gpt2_config, llama_config

LAYER = "model.layers.1.mlp.down_proj"


def batches_of(model, count=6, length=12):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows = [torch.randint(3, VOCABULARY, (size,), generator=generator) for size in (length, length // 2, length)]
        yield padded_batch(rows, 1, model)


def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def streams_of(model, container="model.layers", names=(LAYER,)):
    return Streams(chain_of(model, container), list(batches_of(model)), list(names))


def chain_of(model, container="model.layers"):
    return chain_through(model, container, next(batches_of(model)))


def lossy(model, name=LAYER, rank=4):
    dense = model.get_submodule(name)
    layer = SPMLinear(
        dense.in_features, dense.out_features, False, terms=[LowRank(dense.in_features, dense.out_features, rank)]
    )
    with torch.no_grad():
        left, sizes, right = torch.linalg.svd(dense.weight)
        layer.low_rank.down.weight.copy_(right[:rank])
        layer.low_rank.up.weight.copy_(left[:, :rank] * sizes[:rank])
    return layer.eval()


def at_work(model):
    """Streams in front of block 1, whose layer is replaced."""
    streams = streams_of(model)
    streams.advance()
    streams.convert(LAYER, lossy(model))
    return streams


def test_a_refined_block_is_nearer_to_the_dense_one_and_the_model_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(refine, "RATE", 1e-2)
    model = llama()
    before = copy.deepcopy(model.state_dict())
    streams = at_work(model)
    trained = [*streams.block.mlp.down_proj.parameters(), streams.block.input_layernorm.weight]
    change = refine_(streams, trained, epochs=8, seed=0)
    assert change.after < 0.95 * change.before
    streams.advance()
    dense, converted = list(streams.dense), list(streams.converted)
    norm = model.model.layers[2].input_layernorm
    missed = sum(
        (norm(c) - norm(d))[m.bool()].square().sum() for d, c, m in zip(dense, converted, streams.masks, strict=True)
    )
    energy = sum(norm(d)[m.bool()].square().sum() for d, m in zip(dense, streams.masks, strict=True))
    assert missed / energy < change.before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in trained)


def test_padding_teaches_nothing():
    model, found = llama(), []
    for garbage in (3, 9):
        streams = at_work(model)
        for dense, converted, mask in zip(streams.dense, streams.converted, streams.masks, strict=True):
            # what nothing attends to
            for state in (dense, converted):
                state[mask == 0] = garbage
        layer = streams.block.mlp.down_proj
        refine_(streams, list(layer.parameters()), epochs=1, seed=0)
        found.append(layer.low_rank.up.weight)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_products_in_bfloat16_come_to_where_those_in_float32_do(monkeypatch):
    monkeypatch.setattr(refine, "RATE", 1e-2)
    changes, weights = [], []
    for fast in (False, True):
        monkeypatch.setattr(refine, "multiplies_bfloat16", lambda device, fast=fast: fast)
        streams = at_work(llama())
        layer = streams.block.mlp.down_proj
        changes.append(refine_(streams, list(layer.parameters()), epochs=8, seed=0))
        weights.append(layer.low_rank.up.weight)
    exact, fast = changes
    assert fast.before == exact.before
    assert abs(fast.after - exact.after) < 0.1 * (exact.before - exact.after)
    assert weights[1].dtype == torch.float32
    assert not torch.equal(*weights)


def test_a_block_that_training_makes_worse_is_put_back(monkeypatch):
    monkeypatch.setattr(refine, "RATE", 10.0)
    streams = at_work(llama())
    layer = streams.block.mlp.down_proj
    before = copy.deepcopy(layer.state_dict())
    change = refine_(streams, list(layer.parameters()), epochs=1, seed=0)
    assert change.after == change.before
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_state():
    found = []
    for seed in (0, 0, 1):
        streams = at_work(llama())
        layer, state = streams.block.mlp.down_proj, torch.get_rng_state()
        refine_(streams, list(layer.parameters()), epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(layer.low_rank.up.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("model", "container", "names", "expected"),
    [
        (
            LlamaForCausalLM(llama_config()),
            "model.layers",
            ["model.layers.1.mlp.up_proj"],
            ["model.layers.1.input_layernorm", "model.layers.2.input_layernorm", "model.norm"],
        ),
        (
            GPT2LMHeadModel(gpt2_config()),
            "transformer.h",
            ["transformer.h.0.mlp.c_fc"],
            ["transformer.h.1.ln_1", "transformer.ln_f"],
        ),
        # the norm of a block of BERT is its own last step
        (BertModel(bert_config()), "encoder.layer", ["encoder.layer.0.output.dense"], [None, None]),
    ],
    ids=["llama", "gpt2", "bert"],
)
def test_errors_are_seen_as_the_rest_of_the_model_reads_them(model, container, names, expected):
    model = model.eval()
    streams = streams_of(model, container, names)
    for name in expected:
        found = streams.reading_norm()
        assert (found is None) == (name is None)
        if name is not None:
            assert torch.equal(found.weight, model.get_submodule(name).weight)
        streams.advance()


@pytest.mark.parametrize(
    ("model", "architecture", "expected"),
    [
        (LlamaForCausalLM(llama_config()), "LlamaForCausalLM", blocks.PACKED_ROWS),
        (BertModel(bert_config()), "BertModel", blocks.OTHER_ROWS),
    ],
    ids=["packed", "other"],
)
def test_models_that_read_packed_text_follow_more_rows(model, architecture, expected):
    model.config.architectures = [architecture]
    rows = CalibrationRows([torch.ones(4, dtype=torch.long)] * 300, [], [], [], padding=0, batch_size=16, file_sha256="")
    sizes = [len(batch["input_ids"]) for batch in blocks.following_batches(rows, model)]
    assert sum(sizes) == expected < 300
    assert set(sizes) == {blocks.BATCH_ROWS}
