"""A converted model in vLLM's layers computes what it does in transformers; what those cannot hold is refused by name."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from spmconvert.checkpoint.manifest import LayerSpec, quantization_config
from spmconvert.errors import CheckpointError, CorruptCheckpointError, UnsupportedLayerError
from spmconvert.model.swap import swap_layers
from spmconvert.operator.design import Design
from spmconvert.serving.plugin import register
from tests.conftest import llama_config
from tests.serving import standin

ROOT = Path(__file__).parents[2]
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
LOW_RANK = {"kind": "lowrank", "rank": 3}
# of every kind of term one, alone and in sums; what is not named is dense
TERMS = {
    "model.layers.0.self_attn.q_proj": [{"kind": "monarch", "blocks_in": 2, "blocks_out": 2, "rank": 3}],
    "model.layers.0.self_attn.k_proj": [{"kind": "spm"}, LOW_RANK],
    "model.layers.0.self_attn.o_proj": [{"kind": "blockdense", "blocks_out": 2, "rank": 3}],
    "model.layers.0.mlp.gate_proj": [LOW_RANK],
    "model.layers.0.mlp.up_proj": [{"kind": "sparse24"}, LOW_RANK],
    "model.layers.0.mlp.down_proj": [{"kind": "sparse24", "wrap": True, "wrap_block": 4, "wrap_stages": 2}],
    "model.layers.1.self_attn.v_proj": [{"kind": "spm", "variant": "rotation"}],
    "model.layers.1.mlp.up_proj": [{"kind": "spm", "block": 2, "stages": 1}],
    "model.layers.1.mlp.down_proj": [{"kind": "spm", "stages": 0}, LOW_RANK],
}


@pytest.fixture(autouse=True)
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    """What vLLM knows after it has called the entry point."""
    standin.install(monkeypatch)
    register()
    yield
    sys.modules.pop("spmconvert.serving.quantization", None)


def converted_model(attention_bias, mlp_bias, new_bias=()):
    """A tiny Llama with replaced layers, as transformers has it, and its layer map."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(attention_bias=attention_bias, mlp_bias=mlp_bias, num_hidden_layers=2)).eval()
    specs = {}
    for name, terms in TERMS.items():
        dense = model.get_submodule(name)
        design = Design.from_options(dense.in_features, dense.out_features, terms)
        specs[name] = LayerSpec(design, dense.bias is not None or name in new_bias)
    swap_layers(model, specs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model, specs


class ServedModel(nn.Module):
    """The linear layers of a Llama as vLLM has them."""

    def __init__(self, config, quant, tp_size=1):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        heads = [config.num_attention_heads * config.head_dim] + [config.num_key_value_heads * config.head_dim] * 2
        attention, mlp = config.attention_bias, config.mlp_bias
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for index in range(config.num_hidden_layers):
            layer, prefix = nn.Module(), f"model.layers.{index}"
            for part, name, build in (
                ("self_attn", "qkv_proj", lambda p: standin.QKVParallelLinear(width, heads, attention, quant, p, tp_size)),
                ("self_attn", "o_proj", lambda p: standin.RowParallelLinear(heads[0], width, attention, quant, p, tp_size)),
                ("mlp", "gate_up_proj", lambda p: standin.MergedColumnParallelLinear(width, [inner] * 2, mlp, quant, p)),
                ("mlp", "down_proj", lambda p: standin.RowParallelLinear(inner, width, mlp, quant, p)),
            ):
                if not hasattr(layer, part):
                    setattr(layer, part, nn.Module())
                setattr(layer.get_submodule(part), name, build(f"{prefix}.{part}.{name}"))
            self.model.layers.append(layer)

    def linears(self):
        return {name: module for name, module in self.named_modules() if isinstance(module, standin.LinearBase)}

    def finish(self):
        for module in self.linears().values():
            module.quant_method.process_weights_after_loading(module)
        return self


def config_of(specs, packed=PACKED):
    found = standin.REGISTERED["spm"].from_config(quantization_config(specs))
    found.packed_modules_mapping.update(packed)
    return found


def linear_tensors(model):
    tensors = model.state_dict().items()
    return {name: tensor for name, tensor in tensors if "_proj." in name}


def served(model, specs, tensors=None, walks=True):
    found = ServedModel(model.config, config_of(specs))
    weights = (linear_tensors(model) if tensors is None else tensors).items()
    if walks:
        standin.load_by_walking(found, weights, standin.WeightsMapper(STACKED))
    else:
        standin.load_by_name(found, weights, STACKED)
    return found.finish()


def expected(model, name, x):
    """What transformers' layers compute, side by side where vLLM has one layer for them."""
    parent, _, leaf = name.rpartition(".")
    return torch.cat([model.get_submodule(f"{parent}.{part}")(x) for part in PACKED.get(leaf, [leaf])], -1)


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("walks", [True, False], ids=["walks", "by name"])
def test_every_layer_computes_what_it_does_in_transformers(attention_bias, mlp_bias, walks):
    model, specs = converted_model(attention_bias, mlp_bias)
    found = served(model, specs, walks=walks)
    assert len(found.linears()) == 8
    with torch.inference_mode():
        for name, layer in found.linears().items():
            # as vLLM calls it, as its backend of transformers does, and without tokens
            for shape in ((5,), (1, 300), (0,)):
                x = torch.randn(*shape, model.get_submodule(name).in_features if "down" in name else 32)
                torch.testing.assert_close(layer(x)[0], expected(model, name, x), msg=name)


def test_dense_layers_are_vllms_own():
    model, specs = converted_model(False, False)
    methods = {name: type(layer.quant_method) for name, layer in served(model, specs).linears().items()}
    dense = {name for name, method in methods.items() if method is standin.UnquantizedLinearMethod}
    assert dense == {"model.layers.1.self_attn.o_proj"}


def test_nothing_is_left_of_the_places_but_a_mark():
    model, specs = converted_model(False, False)
    found = served(model, specs)
    layer = found.linears()["model.layers.0.self_attn.qkv_proj"]
    assert {name for name, _ in layer.named_children()} == {"served"}
    assert layer.weight.shape == (1, 1, 1)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    # once more, as after a reload that brought nothing
    layer.quant_method.process_weights_after_loading(layer)


def test_half_precision_layers_are_as_exact_as_in_transformers():
    model, specs = converted_model(True, True)
    exact = {name: expected(model, name, x) for name, x in inputs(model).items()}
    half = model.bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    found = served(half, specs)
    with torch.inference_mode():
        for name, x in inputs(model).items():
            error, own = (
                (y.double() - exact[name]).norm()
                for y in (found.linears()[name](x.bfloat16())[0], expected(half, name, x.bfloat16()))
            )
            assert error <= 2 * own, name


def inputs(model):
    generator = torch.Generator().manual_seed(0)
    sizes = {"qkv_proj": 32, "o_proj": 32, "gate_up_proj": 32, "down_proj": 88}
    names = [
        f"model.layers.0.{part}" for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    return {
        name: torch.randn(7, sizes[name.rpartition(".")[2]], generator=generator, dtype=torch.float64) for name in names
    }


def test_a_layer_that_keeps_its_own_dtype_is_rounded_once():
    model, specs = converted_model(False, False)
    pinned = {name: LayerSpec(spec.design, spec.bias, dtype="float32") for name, spec in specs.items()}
    found = served(model, pinned)
    x = torch.randn(4, 32)
    name = "model.layers.0.self_attn.qkv_proj"
    y = found.linears()[name](x)[0]
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected(model, name, x), rtol=1e-5, atol=1e-5)


def test_the_whole_layer_compiles_without_a_break():
    model, specs = converted_model(True, False)
    found = served(model, specs)
    with torch.inference_mode():
        for name, x in inputs(model).items():
            layer = found.linears()[name]
            compiled = torch.compile(lambda x, layer=layer: layer(x)[0], fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x), expected(model, name, x), msg=name)


def test_a_new_bias_inside_of_low_rank_is_kept_and_any_other_refused():
    inside = "model.layers.0.mlp.gate_proj"
    model, specs = converted_model(False, False, new_bias=[inside])
    x = torch.randn(4, 32)
    name = "model.layers.0.mlp.gate_up_proj"
    torch.testing.assert_close(served(model, specs).linears()[name](x)[0], expected(model, name, x))
    model, specs = converted_model(False, False, new_bias=["model.layers.0.self_attn.q_proj"])
    with pytest.raises(UnsupportedLayerError, match=r"0\.self_attn\.q_proj has a bias .* without --new-bias"):
        served(model, specs)


def test_a_bias_that_a_layer_lost_is_zero():
    model, specs = converted_model(False, False)
    model.config.mlp_bias = True
    rest = linear_tensors(model)
    rest |= {f"model.layers.{i}.mlp.gate_proj.bias": torch.zeros(88) for i in range(2)}
    x = torch.randn(4, 32)
    found = served(model, specs, rest).linears()["model.layers.0.mlp.gate_up_proj"](x)[0]
    torch.testing.assert_close(found, expected(model, "model.layers.0.mlp.gate_up_proj", x))


def test_names_of_another_head_and_of_another_model_are_found():
    model, specs = converted_model(False, False)
    bare = {name.removeprefix("model."): spec for name, spec in specs.items()}
    name, x = "model.layers.0.self_attn.qkv_proj", torch.randn(3, 32)
    torch.testing.assert_close(served(model, bare).linears()[name](x)[0], expected(model, name, x))
    quant = config_of(specs)
    mapper = standin.WeightsMapper(STACKED, {"model.": "language_model.model."})
    quant.apply_vllm_mapper(mapper.get_rename_mapper())
    method = quant.get_quant_method(standin.LinearBase.__new__(standin.LinearBase), f"language_model.{name}")
    assert type(method).__name__ == "SPMLinearMethod"


def test_berts_attention_is_found_under_the_name_that_vllm_gives_it():
    name = "encoder.layer.0.attention.self.key"
    quant = config_of(low_rank_map(name, outputs=32), {"qkv_proj": ["query", "key", "value"]})
    prefix = "model.encoder.layer.0.attention.output.qkv_proj"
    layer = standin.QKVParallelLinear(32, [32] * 3, True, quant, prefix)
    with pytest.raises(CorruptCheckpointError, match=r"no model\.encoder\.layer\.0\.attention\.self\."):
        layer.quant_method.process_weights_after_loading(layer)


def test_what_is_no_linear_layer_is_left_to_vllm():
    _, specs = converted_model(False, False)
    assert config_of(specs).get_quant_method(nn.Embedding(3, 4), "model.embed_tokens") is None


def test_tensor_parallelism_is_refused_by_name():
    model, specs = converted_model(False, False)
    message = r"model\.layers\.0\.self_attn\.qkv_proj is to be split .* 32 x 32 of 32 x 64.* --tensor-parallel-size 1"
    with pytest.raises(UnsupportedLayerError, match=message):
        ServedModel(model.config, config_of(specs), tp_size=2)
    rows = {name: spec for name, spec in specs.items() if name.endswith("o_proj")}
    with pytest.raises(UnsupportedLayerError, match=r"o_proj is to be split .* 16 x 32 of 32 x 32"):
        ServedModel(model.config, config_of(rows), tp_size=2)


MISSING = [
    "model.layers.0.self_attn.k_proj.lowrank.down.weight",
    "model.layers.0.mlp.up_proj.sparse24.positions",
    "model.layers.0.self_attn.q_proj.weight",
    # dense beside replaced ones
    "model.layers.0.self_attn.v_proj.weight",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(name):
    model, specs = converted_model(False, False)
    tensors = {key: tensor for key, tensor in linear_tensors(model).items() if key != name}
    with pytest.raises(CorruptCheckpointError, match=f"the checkpoint has no {name};"):
        served(model, specs, tensors)


WRONG = {
    "model.layers.0.self_attn.k_proj.lowrank.down.weight": (torch.zeros(4, 32), "4 x 32 .* needs 3 x 32"),
    "model.layers.0.mlp.up_proj.sparse24.positions": (torch.zeros(88, 4), r"\(float32\) .* needs 88 x 4 \(uint8\)"),
    "model.layers.0.self_attn.q_proj.weight": (torch.zeros(32, 32), "32 x 32 .* that is .* needs 1 x 1 x 1"),
    "model.layers.0.self_attn.v_proj.weight": (torch.zeros(1, 1, 1), "a layer that is dense needs 16 x 32"),
    "model.layers.0.self_attn.v_proj.lowrank.up.weight": (torch.zeros(16, 3), "and the layer is dense"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_that_does_not_fit_is_named(name):
    model, specs = converted_model(False, False)
    tensor, message = WRONG[name]
    with pytest.raises(CorruptCheckpointError, match=f"{name}.*{message}"):
        served(model, specs, linear_tensors(model) | {name: tensor})


def test_another_layer_than_the_map_says_is_refused():
    model, specs = converted_model(False, False)
    name = "model.layers.0.self_attn.k_proj"
    changed = specs | {name: LayerSpec(Design.from_options(32, 48, [LOW_RANK]), bias=False)}
    with pytest.raises(CheckpointError, match=r"k_proj is 32 x 16 in vLLM's model and 32 x 48 in the layer map"):
        served(model, changed)


def low_rank_map(*names, outputs=96, **options):
    return {name: LayerSpec(Design.from_options(32, outputs, [LOW_RANK]), bias=False, **options) for name in names}


def test_a_layer_that_the_checkpoint_has_fused_is_one():
    """Phi-3's; vLLM's loaders give such tensors without a shard, or with all of them."""
    fused = "model.layers.0.mlp.gate_up_proj"
    layer = standin.MergedColumnParallelLinear(32, [48, 48], False, config_of(low_rank_map(fused)), fused)
    tensors = {"lowrank.down.weight": torch.randn(3, 32), "lowrank.up.weight": torch.randn(96, 3)}
    list(layer.load_weights((tensors | {"weight": torch.zeros(1, 1, 1)}).items()))
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x)[0], x @ tensors["lowrank.down.weight"].t() @ tensors["lowrank.up.weight"].t())


def test_layouts_that_nobody_knows_are_refused():
    name = "gpt_neox.layers.0.attention.query_key_value"
    with pytest.raises(UnsupportedLayerError, match=r"query_key_value is fused in the checkpoint.*dense export"):
        standin.QKVParallelLinear(32, [32, 32, 32], False, config_of(low_rank_map(name)), name)
    part = "model.layers.0.linear_attn.in_proj_qkv"
    quant = config_of(low_rank_map(part), {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]})
    with pytest.raises(UnsupportedLayerError, match="has 4 parts in vLLM and 2 layers in the checkpoint"):
        standin.MergedColumnParallelLinear(32, [32] * 4, False, quant, "model.layers.0.linear_attn.in_proj_qkvz")
    quant = config_of(low_rank_map("layers.0.k_proj", outputs=32))
    layer = standin.QKVParallelLinear(32, [32] * 3, False, quant, "layers.0.qkv_proj")
    with pytest.raises(CheckpointError, match=r"part 'x' of the layer that is made of layers\.0\.q_proj, "):
        layer.weight.weight_loader(layer.weight, torch.zeros(32, 32), "x")


REFUSED = {
    "model.layers.0.mlp.experts.3.gate_up": ({}, r"model\.layers\.0\.mlp\.experts has replaced layers inside"),
    "model.layers.0.mlp.experts.gate_up": ({"experts": 8}, r"model\.layers\.0\.mlp\.experts has replaced layers inside"),
    "lstm.l0.recurrent": ({}, "lstm has replaced layers inside"),
    "h.0.mlp.c_fc": ({"fan_in_fan_out": True}, r"h\.0\.mlp\.c_fc is a Conv1D"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_vllm_has_no_such_place_for_are_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(UnsupportedLayerError, match=f"{message}.*spmconvert export --format dense"):
        config_of(low_rank_map(name, **options))


def test_maps_that_cannot_be_read_are_refused():
    config = standin.REGISTERED["spm"]
    with pytest.raises(CheckpointError, match="format_version 99"):
        config.from_config({"format_version": 99, "layers": {}})
    with pytest.raises(CheckpointError, match="no layer map"):
        config.from_config(quantization_config({}))


def test_the_entry_point_is_there_and_may_be_called_again():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["spm"].partition(":")
    getattr(importlib.import_module(module), name)()
    found = standin.REGISTERED["spm"](low_rank_map("layers.0.k_proj"))
    assert found.get_name() == "spm"
    assert "1 layers" in repr(found)
    assert torch.bfloat16 in found.get_supported_act_dtypes()
    assert found.get_min_capability() == 0
    assert found.get_config_filenames() == []


def test_only_what_the_plugin_calls_imports_vllm():
    importing = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "spmconvert").rglob("*.py")
        if any(line.startswith(("import vllm", "from vllm")) for line in file.read_text(encoding="utf-8").splitlines())
    }
    assert importing == {"spmconvert/serving/quantization.py"}
