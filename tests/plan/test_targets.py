"""What presets, patterns and block ranges select, on every architecture that is pinned, and every refusal."""

import json

import pytest
import torch
import transformers
from torch import nn

import spmconvert
from spmconvert.errors import OptionError, TargetError, UnsupportedLayerError
from spmconvert.plan.structure import reads_weight_directly
from spmconvert.plan.targets import matches, select_targets
from tests.plan.architectures import ARCHITECTURES, SNAPSHOT, build, presets_of

EXPECTED = json.loads(SNAPSHOT.read_text())


def names(model, *targets, **options):
    return [target.name for target in select_targets(model, targets=targets, **options).targets]


def test_snapshot_covers_all_architectures():
    assert EXPECTED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_presets(name):
    assert presets_of(name) == EXPECTED[name]


def test_shapes_of_linear_and_conv1d():
    gpt2 = select_targets(build("gpt2"), targets=["attn"]).targets[0]
    assert (gpt2.name, gpt2.kind, gpt2.in_features, gpt2.out_features, gpt2.bias) == (
        "transformer.h.0.attn.c_attn",
        "conv1d",
        32,
        96,
        True,
    )
    llama = select_targets(build("llama"), targets=["*.up_proj"]).targets[0]
    assert (llama.kind, llama.in_features, llama.out_features, llama.bias) == ("linear", 32, 80, False)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.0.mlp.up_proj", 1),
        ("layers.0.mlp.up_proj", 1),
        ("*.mlp.*", 6),
        ("up_proj", 2),
        ("*_proj", 14),
        ("model.layers.[0]*", 7),
        (r"re:.*\.(up|down)_proj", 4),
    ],
)
def test_patterns(pattern, count):
    assert len(names(build("llama"), pattern)) == count


def test_several_patterns_keep_module_order():
    assert names(build("llama"), "*.1.mlp.up_proj", "*.0.mlp.down_proj") == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_ignore():
    model = build("llama")
    assert len(names(model, "mlp", ignore=["*.up_proj"])) == 4
    assert len(names(model, "all", ignore=["attn"])) == 6
    with pytest.raises(TargetError, match="leaves no layer"):
        names(model, "mlp", ignore=["all"])
    with pytest.raises(TargetError, match=r"--ignore up_porj matches no.*up_proj"):
        names(model, "mlp", ignore=["up_porj"])


@pytest.mark.parametrize(
    ("layers", "blocks"), [("0", "0"), ("-1", "1"), ("0-1", "01"), ("0--1", "01"), ("0,-1", "01"), (" 1 ", "1")]
)
def test_block_numbers(layers, blocks):
    assert [name.split(".")[2] for name in names(build("gpt2"), "c_fc", layers=layers)] == list(blocks)


def test_block_numbers_apply_to_every_stack():
    assert len(names(build("t5"), "mlp", layers="-1")) == 4


@pytest.mark.parametrize("layers", ["", "a", "1-", "2", "-3", "1-0", "0-5", "0;1"])
def test_bad_block_numbers(layers):
    with pytest.raises(OptionError, match="--layers"):
        names(build("gpt2"), "mlp", layers=layers)


def test_block_numbers_leave_layers_outside_out():
    with pytest.raises(TargetError, match="leaves no layer"):
        names(build("llama"), "lm_head", layers="0")


def test_nothing_matches_lists_near_names():
    with pytest.raises(TargetError, match=r"matches no linear layer.*up_proj"):
        names(build("llama"), "model.layers.0.mlp.up_porj")


def test_bad_regular_expression():
    with pytest.raises(OptionError, match="not a regular expression"):
        names(build("llama"), "re:(")


def test_no_targets():
    with pytest.raises(OptionError, match="no targets"):
        names(build("llama"))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "whisper", "t5"])
def test_naming_a_tied_head_explains(name):
    head = "proj_out" if name == "whisper" else "lm_head"
    with pytest.raises(TargetError, match="shares its weight with"):
        names(build(name), head)


def test_wildcards_pass_tied_layers_by():
    selection = select_targets(build("llama-tied"), targets=["*"])
    assert len(selection.targets) == 14
    assert any(skipped.name == "lm_head" and "embed_tokens" in skipped.reason for skipped in selection.skipped)


def test_untied_head_can_be_named():
    assert names(build("llama"), "lm_head") == ["lm_head"]


def test_layers_tied_to_each_other():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert names(model, "*") == ["c"]


class FeedForward(nn.Module):
    def __init__(self, width=4, inner=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)


def test_module_under_two_names_is_tied_to_itself():
    # a swap replaces one name, so the other would keep the dense layer
    shared = FeedForward()
    model = nn.ModuleDict({"layers": nn.ModuleList([shared, FeedForward(), shared])})
    selection = select_targets(model, targets=["all"])
    assert [target.name for target in selection.targets] == ["layers.1.up", "layers.1.down"]
    assert selection.skipped[0].reason == "shares its weight with layers.2.up"


def test_list_of_bare_layers_is_no_stack():
    model = nn.ModuleDict({"h": nn.ModuleList([FeedForward()]), "heads": nn.ModuleList([nn.Linear(4, 4)])})
    selection = select_targets(model, targets=["all"])
    assert [target.name for target in selection.targets] == ["h.0.up", "h.0.down"]
    assert [skipped.name for skipped in selection.skipped] == ["heads.0"]
    assert names(model, "heads.0") == ["heads.0"]


@pytest.mark.parametrize("name", ["bert", "opt", "llama", "t5"])
def test_square_feed_forward(name):
    config_class, model_class, sizes = ARCHITECTURES[name]
    inner = {"opt": "ffn_dim", "t5": "d_ff"}.get(name, "intermediate_size")
    config = getattr(transformers, config_class)(**{**sizes, inner: 32})
    with torch.device("meta"):
        square = getattr(transformers, model_class)._from_config(config)
    assert names(square, "mlp") == names(build(name), "mlp")
    assert names(square, "attn") == names(build(name), "attn")


def test_negative_block_numbers_count_blocks_without_layers():
    model = nn.ModuleDict({"h": nn.ModuleList([FeedForward(), FeedForward(), nn.Identity()])})
    assert names(model, "mlp", layers="-2") == ["h.1.up", "h.1.down"]


def test_block_numbers_need_blocks():
    with pytest.raises(OptionError, match="no numbered blocks"):
        names(nn.ModuleDict({"a": nn.Linear(4, 4)}), "a", layers="0")


def test_class_of_the_same_name_as_a_plain_subclass_is_not_linear():
    impostor = type("FalconLinear", (nn.Module,), {})()
    model = nn.ModuleDict({"a": impostor, "b": nn.Linear(4, 4)})
    assert names(model, "*") == ["b"]


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("llama", "model.embed_tokens", "of type Embedding"),
        ("llama", "model.norm", "RMSNorm"),
        ("vit", "vit.embeddings.patch_embeddings.projection", "Conv2d"),
        ("mixtral", "*.experts*", "fused three-dimensional"),
        ("mixtral", "model.layers.0.mlp.experts", "fused three-dimensional"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", "fused three-dimensional"),
        ("mamba", "*.dt_proj", "reads its weight itself"),
    ],
)
def test_what_cannot_be_converted(name, pattern, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        names(build(name), pattern)


def test_experts_one_below_the_other_are_named():
    model = transformers.DbrxForCausalLM(
        transformers.DbrxConfig(
            d_model=32,
            n_heads=2,
            n_layers=2,
            vocab_size=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        )
    )
    left = {item.name: item.reason for item in select_targets(model, targets=["attn"]).skipped}
    assert "one below the other" in left["transformer.blocks.1.ffn.experts.mlp.w2"]
    with pytest.raises(UnsupportedLayerError, match=r"ffn\.experts\.mlp\.w1: .*one below the other.*not convertible"):
        names(model, "*.experts*")


class Gated(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.w1, self.w2 = nn.Linear(8, inner), nn.Linear(inner, 8)


class Listed(nn.Module):
    """A block whose experts are modules in a list; the last has another size where that is asked for."""

    def __init__(self, kind, last=6):
        super().__init__()
        self.router, self.top_k = nn.Linear(8, 4), 2
        experts = [Gated(inner) for inner in (6, 6, 6, last)]
        if kind == "list":
            self.experts = nn.ModuleList(experts)
        else:
            self.experts = nn.ModuleDict({f"expert_{index}": expert for index, expert in enumerate(experts)})


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_experts_in_a_list_are_a_group_a_projection(kind):
    model = nn.ModuleDict({"h": nn.ModuleList([Listed(kind), Listed(kind)])})
    found = select_targets(model, targets=["*.experts.*"]).targets
    assert {target.group for target in found} == {f"h.{block}.experts.w{number}" for block in (0, 1) for number in (1, 2)}
    assert {target.share for target in found} == {0.5}
    with pytest.raises(TargetError, match="all have one design"):
        select_targets(model, targets=["*3.w1"])


def test_experts_of_several_sizes_are_no_group():
    model = nn.ModuleDict({"h": nn.ModuleList([Listed("list", last=12)])})
    assert {target.group for target in select_targets(model, targets=["*.experts.*"]).targets} == {""}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = nn.MultiheadAttention(8, 2)
        self.gate, self.up, self.down = nn.Linear(8, 1), nn.Linear(8, 32), nn.Linear(32, 8)


def test_multihead_attention_is_not_a_plain_linear():
    model = nn.ModuleDict({"h": nn.ModuleList([Block()])})
    assert names(model, "mlp") == names(model, "all") == ["h.0.up", "h.0.down"]
    with pytest.raises(UnsupportedLayerError, match="NonDynamicallyQuantizableLinear"):
        names(model, "h.0.mixer.out_proj")


def test_what_is_left_alone_in_a_block():
    selection = select_targets(nn.ModuleDict({"h": nn.ModuleList([Block()])}), targets=["all"])
    assert {skipped.name: skipped.reason for skipped in selection.skipped} == {
        "h.0.gate": "router",
        "h.0.mixer.out_proj": "of type NonDynamicallyQuantizableLinear, not a plain linear layer",
    }


def test_asking_for_a_dtype_is_not_reading():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.wo = nn.Linear(2, 2)

        def forward(self, x):
            return self.wo(x.to(self.wo.weight.dtype)) if isinstance(self.wo.weight, torch.Tensor) else x

    class Reads(Asks):
        def forward(self, x):
            return x @ self.wo.weight

    assert not reads_weight_directly(nn.ModuleDict({"m": Asks()}), "m.wo")
    assert reads_weight_directly(nn.ModuleDict({"m": Reads()}), "m.wo")


def test_matches():
    assert matches("h.*.c_fc", "h.0.c_fc")
    assert not matches("c_f", "h.0.c_fc")
    assert not matches("re:c_fc", "h.0.c_fc")
    assert matches("h.0.c_fc", "transformer.h.0.c_fc", prefix="transformer")


@pytest.fixture(scope="module")
def seeing():
    """A language model with eyes, on the meta device."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "llama", **sizes, "vocab_size": 64}
    eyes = {"model_type": "clip_vision_model", **sizes, "image_size": 16, "patch_size": 8}
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(text_config=text, vision_config=eyes, image_token_index=63)
        )


@pytest.mark.parametrize(
    ("targets", "ignore", "tower", "places"),
    [
        (["mlp"], [], None, {"language_model", "vision_tower"}),
        (["mlp"], [], "text", {"language_model"}),
        (["text:mlp"], [], None, {"language_model"}),
        (["vision:attn"], [], None, {"vision_tower"}),
        (["vision:mlp"], [], "text", {"vision_tower"}),
        (["text:all", "vision:mlp"], [], None, {"language_model", "vision_tower"}),
        (["text:*.up_proj"], [], None, {"language_model"}),
        (["vision:re:.*fc1"], [], None, {"vision_tower"}),
        (["mlp"], ["vision:mlp"], None, {"language_model"}),
        (["mlp"], ["vision:*fc*"], None, {"language_model"}),
    ],
)
def test_towers(seeing, targets, ignore, tower, places):
    selection = select_targets(seeing, targets=targets, ignore=ignore, tower=tower)
    assert {target.name.split(".")[1] for target in selection.targets} == places
    left = {skipped.name for skipped in selection.skipped}
    assert not left & {target.name for target in selection.targets}


def test_what_a_text_does_not_run_is_left_alone_with_the_reason(seeing):
    selection = select_targets(seeing, targets=["mlp"], tower="text")
    reasons = {skipped.reason for skipped in selection.skipped if "vision_tower" in skipped.name}
    assert reasons == {"in the vision tower, which the calibration does not run; vision:mlp would take it"}


def test_towers_that_are_not_there(seeing, checkpoints):
    with pytest.raises(
        TargetError, match="names an audio tower, and LlavaForConditionalGeneration has towers for vision, text"
    ):
        select_targets(seeing, targets=["audio:mlp"])
    with pytest.raises(TargetError, match="GPT2LMHeadModel has no towers; write mlp"):
        select_targets(spmconvert.load(checkpoints["gpt2"]), targets=["text:mlp"])
    with pytest.raises(TargetError, match="matches no linear layer"):
        select_targets(seeing, targets=["vision:*.up_proj"])
