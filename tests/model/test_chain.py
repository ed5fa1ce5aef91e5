"""A model that is walked block by block puts out what it puts out as a whole, wherever its blocks are."""

import copy

import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import AutoConfig, AutoModel, BertModel, T5Config, T5ForConditionalGeneration

import spmconvert
from spmconvert.data.tokens import padded_batch
from spmconvert.model.architecture import load_config
from spmconvert.model.chain import Chain, Walk, chain_through, common_list, loaded_copy
from spmconvert.model.loading import load_with_blocks_on_disk
from spmconvert.model.opening import open_
from spmconvert.model.states import States

CONTAINERS = {
    "gpt2": "transformer.h", "llama": "model.layers", "llama-bf16": "model.layers", "bert": "encoder.layer",
    "mixtral": "model.layers",
}  # fmt: skip


def batches_of(model, count=2):
    """Rows of two lengths, so that one is padded."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield padded_batch([torch.randint(3, 60, (length,), generator=generator) for length in (9, 5)], 1, model)


def walked(chain, batches):
    walk = Walk(chain, batches)
    for index in range(len(chain)):
        walk.advance(chain.block(index))
    return walk


@torch.no_grad()
def outputs(model, batch):
    return model(**batch)[0][batch["attention_mask"].bool()]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_walk_ends_where_the_model_does(checkpoints, name):
    config = load_config(checkpoints[name])
    whole = spmconvert.load(checkpoints[name], dtype=torch.float32).eval()
    model = load_with_blocks_on_disk(checkpoints[name], config, "cpu", CONTAINERS[name])
    batches = list(batches_of(model))
    chain = chain_through(model, CONTAINERS[name], batches[0])
    walk = walked(chain, batches)
    for batch, state in zip(batches, walk.states, strict=True):
        with chain.ending_in(state):
            found = outputs(model, batch)
        torch.testing.assert_close(found, outputs(whole, batch), rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for block in model.get_submodule(CONTAINERS[name]) for parameter in block.parameters())
    open_(whole)
    for index in range(len(chain)):
        expected = whole.get_submodule(chain.name(index)).state_dict()
        for key, tensor in chain.block(index).state_dict().items():
            assert torch.equal(tensor, expected[key])


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_blocks_that_hand_on_what_the_first_one_found(stack):
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    batch = {name: torch.randint(3, 60, (2, 7)) for name in ("input_ids", "decoder_input_ids")}
    batch["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    before = dict(model.named_modules())
    chain = chain_through(model, f"{stack}.block", batch)
    walk = walked(chain, [batch])
    with chain.ending_in(walk.states[0]), torch.no_grad():
        found = model(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert dict(model.named_modules()) == before
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_blocks_that_are_called_in_another_way_are_no_chain(checkpoints):
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32).eval()
    (batch,) = batches_of(model, 1)
    assert chain_through(model, "transformer.h", batch) is not None
    changed = copy.deepcopy(model)
    changed.transformer.h[1].register_forward_pre_hook(lambda _, given: (given[0] + 1.0, *given[1:]))
    assert chain_through(changed, "transformer.h", batch) is None
    twice = copy.deepcopy(model)
    twice.transformer.h.append(twice.transformer.h[1])
    twice.transformer.h[1].register_forward_hook(lambda own, given, output: own.forward(*given))
    assert chain_through(twice, "transformer.h", batch) is None
    own = BertModel(AutoConfig.for_model("bert", **SMALL), add_pooling_layer=False).eval()
    own.encoder.layer = own.encoder.layer[:1]
    assert chain_through(own, "encoder.layer", batch) is not None, "one block is a chain"


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64,
}  # fmt: skip


def test_layers_of_one_list(checkpoints):
    model = AutoModel.from_pretrained(checkpoints["llama"])
    names = [f"layers.{index}.mlp.up_proj" for index in range(2)]
    assert common_list(model, names) == ("layers", {names[0]: 0, names[1]: 1})
    assert common_list(model, [*names, "norm"]) is None


def test_gradients_come_through_what_is_behind_the_blocks(checkpoints):
    model = spmconvert.load(checkpoints["llama"], dtype=torch.float32).eval()
    (batch,) = batches_of(model, 1)
    chain = chain_through(model, "model.layers", batch)
    state = walked(chain, [batch]).states[0].requires_grad_()
    with chain.ending_in(state):
        model(**batch).logits.sum().backward()
    normed = model.model.norm(state.detach().requires_grad_())
    expected = torch.autograd.functional.vjp(lambda s: model.lm_head(model.model.norm(s)).sum(), state.detach())[1]
    assert normed.shape == state.shape
    torch.testing.assert_close(state.grad, expected)


def test_states_are_the_same_in_memory_and_in_a_file(tmp_path):
    given = [torch.randn(3, 5), torch.randn(2, 5, dtype=torch.float64)]
    memory, file = States(given), States(given, tmp_path, limit=8)
    assert (memory.is_mapped, file.is_mapped) == (False, True)
    assert States(given, tmp_path).is_mapped is False, "few"
    assert not list(tmp_path.iterdir()), "it has no name any more"
    for states in (memory, file):
        states[1] = layer_norm(states[1], (5,))
        assert len(states) == 2
        assert {state.dtype for state in states} == {torch.float32}
    for one, other in zip(memory, file, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(memory[1], given[1].float())


def test_a_walk_with_its_states_in_a_file_is_the_same(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("spmconvert.model.states.STATES_LIMIT", 16)
    model = spmconvert.load(checkpoints["llama"], dtype=torch.float32).eval()
    batches = list(batches_of(model))
    found = []
    for folder in (None, tmp_path):
        walk = walked(chain_through(model, "model.layers", batches[0], folder), batches)
        assert walk.states.is_mapped == (folder is not None)
        found.append(list(walk.states))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_copy_is_watched_by_nobody(checkpoints):
    model = load_with_blocks_on_disk(checkpoints["llama"], load_config(checkpoints["llama"]), "cpu", "model.layers")
    block = loaded_copy(model.model.layers[0])
    assert not any("_hf_hook" in module.__dict__ for module in block.modules())
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in block.parameters())
    assert isinstance(Chain(model, "model.layers").block(0), type(block))
