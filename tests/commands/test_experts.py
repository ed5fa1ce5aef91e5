"""Mixtures of experts, from the fused parameters of a family to a converted model and back."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import spmconvert
from spmconvert.budget.times import TimeTable
from spmconvert.checkpoint.checksums import write_checksums
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.commands.export import export
from spmconvert.commands.finetune import finetune
from spmconvert.commands.report import report
from spmconvert.commands.verify import verify
from spmconvert.model.opening import open_
from spmconvert.model.stacked_experts import is_converted
from spmconvert.model.swap import as_it_runs
from tests.conftest import VOCABULARY, _save
from tests.support import QUICK, SHORT, raw_tensors

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Family:
    """A family of mixtures: its classes, what its config has beside the sizes, and how its tensors are stored."""

    config: str
    model: str
    own: dict = field(default_factory=dict)
    experts: int = 4
    chosen: int = 2
    passed_on: int = 0
    targets: str = "*.experts.*"
    without: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the tokens, that an expert sees."""
        return self.chosen / (self.experts + self.passed_on)

    def sizes(self) -> dict:
        """What its config is made of."""
        return {key: value for key, value in {**SIZES, **self.own}.items() if key not in self.without}


FAMILIES = {
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16},
        experts=6,
    ),
    "olmoe": Family("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 5, "num_experts_per_tok": 2}, experts=5),
    "deepseek-v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 2,
        },
        experts=8,
        chosen=3,
    ),
    "gpt-oss": Family(
        "GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    ),
    "llama4": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 16,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 1,
        },
        chosen=1,
    ),
    "granite-moe": Family("GraniteMoeConfig", "GraniteMoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nemotron-h": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["moe", "attention", "moe"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
        },
        without=("num_hidden_layers",),
    ),
    # two experts hand tokens on as they are
    "longcat-flash": Family(
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        {
            **LATENT,
            "num_layers": 2,
            "head_dim": 8,
            "ffn_hidden_size": 48,
            "moe_topk": 3,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 24,
        },
        chosen=3,
        passed_on=2,
        without=("num_hidden_layers", "intermediate_size"),
    ),
    # a projection of all experts is a module of its own, in attentions as well
    "jetmoe": Family(
        "JetMoeConfig",
        "JetMoeForCausalLM",
        {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        targets="*put_linear.*",
        without=("num_attention_heads",),
    ),
    # what its gates let through is clamped in the first block
    "step": Family(
        "Step3p7Config",
        "Step3p7ForConditionalGeneration",
        {
            "text_config": {
                **SIZES,
                "head_dim": 16,
                "moe_intermediate_size": 24,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "share_expert_dim": 24,
                "sliding_window": 16,
                "mlp_layer_types": ["sparse", "sparse"],
                "layer_types": ["full_attention", "full_attention"],
                "swiglu_limits": [0.05, 0.0],
            },
            "vision_config": {**TOWER, "image_size": 28, "patch_size": 14},
        },
        without=tuple(SIZES),
    ),
    # every expert's output goes through a norm
    "muse-spark": Family(
        "MuseSparkConfig",
        "MuseSparkForConditionalGeneration",
        {
            "text_config": {
                **SIZES,
                "head_dim": 16,
                "moe_intermediate_size": 24,
                "moe_hidden_size": 20,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
            "vision_config": TOWER,
            "audio_config": {"hidden_sizes": (8, 8, 8, 8), "out_hidden_size": 32},
        },
        without=tuple(SIZES),
    ),
    # beside routed experts some that every token goes through, fused as well
    "inkling": Family(
        "InklingTextConfig",
        "InklingForCausalLM",
        {
            "head_dim": 16,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "d_rel": 4,
            "rel_extent": 32,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "logits_mup_width_multiplier": 1.0,
        },
        targets="*experts.*",
    ),
}


def built(family: Family):
    config = getattr(transformers, family.config)(**family.sizes())
    torch.manual_seed(0)
    return getattr(transformers, family.model)(config)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Directories of tiny mixtures by family, each made when it is first asked for."""
    root = tmp_path_factory.mktemp("mixtures")

    class Mixtures(dict):
        def __missing__(self, name):
            self[name] = _save(built(FAMILIES[name]).eval(), root / name)
            return self[name]

    return Mixtures()


def logits(model, tokens=None):
    tokens = torch.arange(3, 40)[None] if tokens is None else tokens
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_opened_experts_compute_what_fused_ones_do(name):
    fused, other = (built(FAMILIES[name]).eval() for _ in range(2))
    names = open_(other)
    assert names
    assert other.get_submodule(names[0]).share == FAMILIES[name].share
    torch.testing.assert_close(logits(other), logits(fused), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_converted_and_used(mixtures, text, tmp_path, name):
    out = tmp_path / "o"
    options = {**QUICK, "stages": 0, "rank": 6, "fit.refine": 1}
    conversion = spmconvert.convert(mixtures[name], out, calib=text, targets=FAMILIES[name].targets, **options)
    assert conversion.bytes_after == sum(
        t.numel() * t.element_size() for t in load_file(out / "model.safetensors").values()
    )
    model = spmconvert.load(out).eval()
    stacks = [module for module in model.modules() if is_converted(module)]
    assert sum(getattr(stack, "count", 1) for stack in stacks) == len(conversion.layers)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    model.save_pretrained(tmp_path / "again")
    again = spmconvert.load(tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert {check.outcome for check in verify(out)} <= {"ok", "skipped"}
    exported = export(out, tmp_path / "dense")
    assert exported.difference is not None
    dense = getattr(transformers, FAMILIES[name].model).from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_finetuned(mixtures, text, tmp_path, name):
    options = {"calib": text, "targets": FAMILIES[name].targets, "stages": 0, "rank": 6, **QUICK}
    spmconvert.convert(mixtures[name], tmp_path / "o", **options)
    trained = finetune(tmp_path / "o", tmp_path / "t", data=text, **{**SHORT, "steps": 5})
    assert trained.steps == 5
    assert {check.outcome for check in verify(tmp_path / "t")} <= {"ok", "skipped"}


def test_experts_of_a_projection_are_shown_as_one(run, mixtures, text, tmp_path):
    options = [f"--set={key}={value}" for key, value in QUICK.items()]
    command = ("convert", mixtures["mixtral"], "-o", tmp_path / "o", "--calib", text, "--targets", "*.experts.*")
    code, out, _ = run(*command, "--stages", "0", "--rank", "6", *options)
    assert code == 0
    lines = [line for line in out.splitlines() if ".experts." in line]
    assert len(lines) == 4
    assert "model.layers.0.mlp.experts.*.gate_up (4)" in out.replace("\n", "")
    assert (tmp_path / "o" / "README.md").read_text().count(".experts.") == 4
    code, out, _ = run("report", tmp_path / "o", "--data", text, "--seconds", "0")
    assert out.count(".experts.*.") == 4
    page = (tmp_path / "o" / "report.html").read_text()
    assert page.count('<th scope="row">model.layers.0.mlp.experts.') == 2


def test_a_budget_gives_the_experts_of_a_layer_one_design(mixtures, text, tmp_path):
    out = tmp_path / "o"
    conversion = spmconvert.convert(
        mixtures["qwen3-moe"], out, calib=text, targets="mlp", keep=0.5, allow_slower=True, **QUICK
    )
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    assert set(layers) <= {
        f"model.layers.{i}.mlp.experts.{projection}" for i in range(2) for projection in ("gate_up", "down")
    }
    assert {entry["experts"] for entry in layers.values()} == {6}
    assert conversion.parameters_after < conversion.parameters_before
    found = report(out, data=text, baselines=True, calibration=text, seconds=0.01, rows=8)
    assert found.quality
    share = FAMILIES["qwen3-moe"].chosen / FAMILIES["qwen3-moe"].experts
    met = found.quantity("parameters that a token meets", "replaced layers")
    assert met.dense == round(share * found.quantity("parameters", "replaced layers").dense)
    assert found.candidates


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "granite-moe", "longcat-flash", "step"])
def test_either_layout_gives_the_same_layers(mixtures, text, tmp_path, name):
    """A matrix an expert and projection, as checkpoints have them, and fused parameters, as transformers keeps them."""
    model = getattr(transformers, FAMILIES[name].model).from_pretrained(mixtures[name])
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    shutil.copy(mixtures[name] / "tokenizer.json", tmp_path / "fused")
    shutil.copy(mixtures[name] / "tokenizer_config.json", tmp_path / "fused")
    assert set(load_file(tmp_path / "fused" / "model.safetensors")) != set(load_file(mixtures[name] / "model.safetensors"))
    found = []
    for source in (mixtures[name], tmp_path / "fused"):
        out = tmp_path / f"{source.name}-spm"
        spmconvert.convert(source, out, calib=text, targets="*.experts.*", stages=0, rank=6, **QUICK)
        tensors = load_file(out / "model.safetensors")
        found.append(
            {
                key.partition(".experts.")[2] + key.partition("layers.")[2][:1]: value
                for key, value in tensors.items()
                if ".experts." in key
            }
        )
    # what nothing multiplies by is not stacked
    assert len(found[0]) == 2 * (2 * 3 + 1 + FAMILIES[name].passed_on)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_what_is_left_dense_beside_replaced_projections_is_what_it_was(mixtures, text, tmp_path):
    out = tmp_path / "o"
    spmconvert.convert(mixtures["mixtral"], out, calib=text, targets="*.experts.*.down", stages=0, rank=12, **QUICK)
    model = spmconvert.load(out)
    fused = transformers.MixtralForCausalLM.from_pretrained(mixtures["mixtral"]).model.layers[1].mlp.experts
    left = model.model.layers[1].mlp.experts.gate_up.weight[2]
    torch.testing.assert_close(left, fused.gate_up_proj[2], rtol=0, atol=0)
    assert {check.outcome for check in verify(out)} <= {"ok", "skipped"}
    export(out, tmp_path / "dense")
    dense = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "dense").model.layers[1].mlp.experts
    torch.testing.assert_close(dense.gate_up_proj, fused.gate_up_proj, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        # dense beside what was replaced, the router in front of it, and what stands for the dense parameter
        ("mixtral", ".mlp.experts.gate_up.weight"),
        ("mixtral", ".gate.weight"),
        ("mixtral", ".mlp.experts.down_proj"),
        # nothing multiplies by it
        ("longcat-flash", ".mlp.experts.5.gate_up.weight"),
        ("muse-spark", ".mlp.experts.post_expert_norm.weight"),
        ("jetmoe", ".mlp.input_linear.weight"),
    ],
)
def test_a_change_outside_of_replaced_experts_is_found(mixtures, tmp_path, monkeypatch, name, tensor):
    monkeypatch.setattr("spmconvert.commands.verify.run_fresh", lambda *_: {"architecture": "", "layers": 0})
    targets = {"jetmoe": "*.mlp.output_linear.*"}.get(name, "*.experts.*.down")
    spmconvert.convert(mixtures[name], tmp_path / "o", targets=targets, stages=0, rank=6, **QUICK)
    assert {check.outcome for check in verify(tmp_path / "o")} == {"ok", "skipped"}
    tensors = load_file(tmp_path / "o" / "model.safetensors")
    changed = next(key for key in tensors if key.endswith(tensor))
    tensors[changed] += 1
    save_file(tensors, tmp_path / "o" / "model.safetensors", {"format": "pt"})
    write_checksums(tmp_path / "o")
    (failed,) = [check for check in verify(tmp_path / "o") if check.outcome == "FAILED"]
    assert failed.name == "untouched tensors"
    assert changed in failed.detail


def test_experts_that_are_no_targets_stay_as_the_file_has_them(mixtures, text, tmp_path):
    spmconvert.convert(mixtures["mixtral"], tmp_path / "o", calib=text, targets="attn", stages=0, rank=6, **QUICK)
    before, after = (raw_tensors(directory) for directory in (mixtures["mixtral"], tmp_path / "o"))
    experts = {name for name in before if ".experts." in name}
    assert experts
    assert {name: before[name] for name in experts} == {name: after[name] for name in experts if name in after}


def test_experts_that_are_not_all_there_are_refused_where_they_are_targets(mixtures, text, tmp_path):
    shutil.copytree(mixtures["mixtral"], tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    lost = next(name for name in tensors if ".layers.1." in name and ".experts.2." in name)
    del tensors[lost]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(spmconvert.errors.UnsupportedLayerError, match=r"layers\.1.*experts.* is no tensor"):
        spmconvert.convert(tmp_path / "m", tmp_path / "o", targets="*.experts.*", stages=0, rank=6, **QUICK)
    spmconvert.convert(tmp_path / "m", tmp_path / "o", targets="attn", stages=0, rank=6, **QUICK)


@pytest.mark.parametrize(
    ("targets", "options"), [("*.experts.1.down", {}), ("mlp", {"ignore": "*.experts.2.*"}), ("re:.*experts\\.[0-2].*", {})]
)
def test_a_part_of_the_experts_is_refused(mixtures, tmp_path, targets, options):
    with pytest.raises(spmconvert.errors.TargetError, match="all have one design"):
        spmconvert.convert(mixtures["mixtral"], tmp_path / "o", targets=targets, **options)


def test_an_expert_that_nothing_comes_to_is_named_and_fitted(mixtures, text, tmp_path):
    model = transformers.GptOssForCausalLM.from_pretrained(mixtures["gpt-oss"])
    for layer in model.model.layers:
        layer.mlp.router.bias.data[3] = -1e4
    model.save_pretrained(tmp_path / "m")
    shutil.copy(mixtures["gpt-oss"] / "tokenizer.json", tmp_path / "m")
    shutil.copy(mixtures["gpt-oss"] / "tokenizer_config.json", tmp_path / "m")
    for keep in ({"stages": 0, "rank": 6}, {"keep": 0.4, "allow_slower": True}):
        out = tmp_path / f"o{len(keep)}{keep.get('rank', 0)}"
        conversion = spmconvert.convert(tmp_path / "m", out, calib=text, targets="*.experts.*", **keep, **QUICK)
        idle = {record.name for record in conversion.layers if "no calibration token came" in record.warning}
        assert idle
        assert all(".experts.3." in name for name in idle)
        assert all(record.error < 1 for record in conversion.layers)


def test_an_expert_in_a_list_that_nothing_comes_to_is_named_and_fitted(text, tmp_path):
    config = transformers.NllbMoeConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_experts=4,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        max_position_embeddings=64,
        router_bias=True,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.NllbMoeForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("router.classifier.bias"):
            parameter.data[3] = -1e4
    _save(model, tmp_path / "m")
    for keep in ({"stages": 0, "rank": 6}, {"keep": 0.4, "allow_slower": True}):
        out = tmp_path / f"o{len(keep)}{keep.get('rank', 0)}"
        conversion = spmconvert.convert(tmp_path / "m", out, calib=text, targets="*.experts.*", **keep, **QUICK)
        idle = {record.name for record in conversion.layers if "no calibration token came" in record.warning}
        assert {record.name for record in conversion.layers if ".expert_3." in record.name} <= idle
        assert all(record.error < 1 for record in conversion.layers)
        assert {check.outcome for check in verify(out)} <= {"ok", "skipped"}


def test_a_model_is_converted_while_it_is_loaded(mixtures, tmp_path):
    request = spmconvert.SPMConfig(targets=["*.experts.*"], stages=0, rank=6)
    model = transformers.AutoModelForCausalLM.from_pretrained(mixtures["olmoe"], quantization_config=request).eval()
    model.save_pretrained(tmp_path / "o")
    torch.testing.assert_close(logits(spmconvert.load(tmp_path / "o").eval()), logits(model), rtol=0, atol=0)
    before = logits(model)
    dense = model.dequantize()
    assert not any(map(is_converted, dense.modules()))
    assert dense.model.layers[1].mlp.experts.gate_up_proj.shape == (5, 96, 32)
    torch.testing.assert_close(logits(dense), before, rtol=1e-3, atol=1e-4)


def test_a_dense_mixture_is_timed_as_transformers_runs_it():
    model = built(FAMILIES["gpt-oss"]).eval()
    assert as_it_runs(model) is model
    opened = built(FAMILIES["gpt-oss"]).eval()
    open_(opened)
    fused = as_it_runs(opened)
    assert type(fused.model.layers[0].mlp.experts) is type(model.model.layers[0].mlp.experts)
    assert fused.model.embed_tokens.weight is opened.model.embed_tokens.weight
    assert "0" in dict(opened.model.layers[0].mlp.experts.named_children())
    torch.testing.assert_close(logits(fused), logits(model), rtol=1e-4, atol=1e-5)


def test_times_for_other_numbers_of_tokens():
    table = TimeTable(64)
    assert table.at(64) is table
    assert table.at(16).tokens == 16
    assert table.at(16) is table.at(16)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(mixtures, text, tmp_path, monkeypatch):
    options = {"calib": text, "targets": "*.experts.*", "stages": 0, "rank": 6, **QUICK, "fit.refine": 1}
    spmconvert.convert(mixtures["olmoe"], tmp_path / "whole", **options)
    store, calls = OutputDirectory.store_layer, []

    def stopping(self, *arguments):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(arguments[0])
        store(self, *arguments)

    monkeypatch.setattr(OutputDirectory, "store_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        spmconvert.convert(mixtures["olmoe"], tmp_path / "parts", **options)
    monkeypatch.undo()
    spmconvert.convert(mixtures["olmoe"], tmp_path / "parts", resume=True, **options)
    assert raw_tensors(tmp_path / "parts") == raw_tensors(tmp_path / "whole")


@pytest.mark.parametrize("option", ["layerwise", "guided", "layer_outputs"])
def test_losses_of_single_layers_are_refused_for_experts(mixtures, text, tmp_path, option):
    spmconvert.convert(mixtures["olmoe"], tmp_path / "o", targets="*.experts.*", stages=0, rank=6, **QUICK)
    value = {"layerwise": 2, "guided": 0.5, "layer_outputs": 1.0}[option]
    with pytest.raises(spmconvert.errors.OptionError, match="sees others in each model"):
        finetune(tmp_path / "o", tmp_path / "t", data=text, **SHORT, **{option: value})


def test_everything_can_be_trained(mixtures, text, tmp_path):
    spmconvert.convert(mixtures["mixtral"], tmp_path / "o", calib=text, targets="attn", stages=0, rank=6, **QUICK)
    finetune(tmp_path / "o", tmp_path / "t", data=text, train="all", **SHORT)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ot")
    assert set(before) == set(after)
    expert = next(name for name in before if ".experts.0." in name)
    assert not before[expert].equal(after[expert])


def test_a_program_that_does_not_know_opened_experts_refuses_them(mixtures, text, tmp_path):
    spmconvert.convert(mixtures["mixtral"], tmp_path / "o", targets="*.experts.*", stages=0, rank=6, **QUICK)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'o')!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode
    assert "import spmconvert before this checkpoint is loaded" in run.stderr


def test_what_is_written_down_of_experts_that_hand_tokens_on_computes_the_same():
    model = built(FAMILIES["longcat-flash"]).eval()
    (first, *_) = open_(model)
    experts, states = model.get_submodule(first), torch.randn(9, 32)
    index = torch.randint(0, 6, (9, 2), generator=torch.Generator().manual_seed(0))
    index[0] = torch.tensor([4, 5])
    weights = torch.rand(9, 2)
    with torch.no_grad():
        torch.testing.assert_close(experts._all(states, index, weights), experts._chosen(states, index, weights))
        passed_on = states[0] * weights[0].sum()
        torch.testing.assert_close(experts(states, index, weights)[0], passed_on)
