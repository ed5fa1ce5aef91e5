"""A portable checkpoint runs where spmconvert cannot be imported, by its own code alone, and computes the same."""

import json
import os
import subprocess
import sys
import sysconfig

import pytest
import torch
from transformers import AutoConfig, AutoModel, BertModel

from spmconvert.commands.convert import convert
from spmconvert.commands.export import export
from spmconvert.errors import FitError, UnsupportedLayerError
from spmconvert.exporting import portable
from spmconvert.model.loading import load

QUICK = {"fit.iterations": 2, "fit.refine": 0}
# without the site's start-up files, which an editable installation is found by, and with a refusal for any other
ALONE = """
import json, sys
asked, site = json.loads(sys.argv[1]), sys.argv[2]
sys.path.append(site)
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "spmconvert":
            raise ImportError("spmconvert is refused")
sys.meta_path.insert(0, Refused())
import torch, transformers
for directory, auto in asked:
    model, found = getattr(transformers, auto).from_pretrained(
        directory, trust_remote_code=True, dtype="auto", output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        torch.save(model(torch.arange(3, 23)[None])[0].float(), f"{directory}/outputs.pt")
    if auto == "AutoModelForCausalLM":
        ids = torch.arange(3, 9)[None]
        torch.save(model.generate(ids, max_new_tokens=4, do_sample=False), f"{directory}/words.pt")
        pipe = transformers.pipeline("text-generation", directory, trust_remote_code=True)
        assert pipe("hello", max_new_tokens=2)[0]["generated_text"].startswith("hello")
    model.save_pretrained(f"{directory}-again")
    again = getattr(transformers, auto).from_pretrained(f"{directory}-again", trust_remote_code=True)
    assert all(value.equal(again.state_dict()[key]) for key, value in model.state_dict().items())
assert not [name for name in sys.modules if name.startswith("spmconvert")]
"""


def run_alone(place, asked):
    """In a process that has torch and transformers, and refuses spmconvert."""
    site = sysconfig.get_paths()["purelib"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-S", "-c", ALONE, json.dumps(asked), site]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.fixture(scope="module")
def exports(converted, sums, checkpoints, text, tmp_path_factory):
    """Portable checkpoints beside what they were made of, with the Auto class to load them by."""
    place = tmp_path_factory.mktemp("portable")
    tied = place / "tied"
    convert(checkpoints["llama-tied"], tied, targets="up_proj", layers="0", variant="rotation", stages=3, **QUICK)
    sources = {
        "gpt2": (converted["gpt2"], "AutoModelForCausalLM"),
        "bert": (converted["bert"], "AutoModel"),
        "tied": (tied, "AutoModelForCausalLM"),
        **{name: (sums[name], "AutoModelForCausalLM") for name in ("lowrank", "wrapped")},
    }
    made = {name: export(source, place / f"{name}-p", form="portable") for name, (source, _) in sources.items()}
    run_alone(place, [[str(made[name].output), auto] for name, (_, auto) in sources.items()])
    return {name: (source, made[name]) for name, (source, _) in sources.items()}


@pytest.mark.parametrize("name", ["gpt2", "bert", "tied", "lowrank", "wrapped"])
def test_it_runs_where_spmconvert_cannot_be_imported(exports, name):
    source, result = exports[name]
    model = load(source).eval()
    with torch.no_grad():
        expected = model(torch.arange(3, 23)[None])[0]
    found = torch.load(result.output / "outputs.pt")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert 0 <= result.difference <= 1e-5
    assert "input_ids of 1 x 16" in result.compared
    if name != "bert":
        words = model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False)
        assert torch.load(result.output / "words.pt").equal(words)


def test_the_weights_are_the_same_bytes_and_the_code_is_short(exports):
    for source, result in exports.values():
        assert (result.output / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        code = (result.output / "modeling_spm.py").read_text()
        assert len(code.splitlines()) < 400
        assert "import spmconvert" not in code
        assert "from spmconvert" not in code
    only = (exports["lowrank"][1].output / "modeling_spm.py").read_text()
    assert "nn.Linear" in only
    for other in ("Geometry", "Monarch", "def placed", "MultipliedOut"):
        assert other not in only


def test_all_kinds_of_terms_together_are_short(checkpoints, tmp_path):
    kinds = [{"kind": "spm", "stages": 1}, {"kind": "monarch"}, {"kind": "blockdense"}, {"kind": "sparse24"}]
    overrides = [{"pattern": "*.up_proj", "terms": [{"kind": "sparse24", "wrap": True}]}]
    options = {"design.terms": [*kinds, {"kind": "lowrank"}], "overrides": overrides, "allow_growth": True}
    convert(checkpoints["llama"], tmp_path / "spm", targets="up_proj,down_proj", layers="0", **options, **QUICK)
    result = export(tmp_path / "spm", tmp_path / "portable", form="portable")
    assert len((result.output / "modeling_spm.py").read_text().splitlines()) < 400


def test_every_auto_class_of_the_architecture_is_named(exports):
    _, result = exports["bert"]
    named = json.loads((result.output / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"} <= set(named)
    assert named["AutoModelForQuestionAnswering"] == "modeling_spm.BertForQuestionAnswering"


def test_nothing_is_loaded_without_permission(exports):
    _, result = exports["bert"]
    for options in ({}, {"ignore_mismatched_sizes": True}, {"trust_remote_code": False}):
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModel.from_pretrained(result.output, **options)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(result.output)
    # a concrete class does not ask; the layers' mark has no shape that a dense layer can have
    with pytest.raises(RuntimeError, match="mismatched"):
        BertModel.from_pretrained(result.output)


def test_a_missing_tensor_of_a_layer_is_an_error(exports, tmp_path):
    from safetensors.torch import load_file, save_file

    _, result = exports["lowrank"]
    with portable._imported(result.output / "modeling_spm.py") as module:
        for file in ("config.json", "generation_config.json"):
            (tmp_path / file).write_bytes((result.output / file).read_bytes())
        tensors = load_file(result.output / "model.safetensors")
        gone = next(name for name in tensors if name.endswith("lowrank.up.weight"))
        save_file(
            {key: value for key, value in tensors.items() if key != gone}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(ValueError, match=f"{gone} is missing"):
            module.LlamaForCausalLM.from_pretrained(tmp_path)


def test_models_whose_tensors_are_renamed_on_load(checkpoints, tmp_path):
    convert(checkpoints["vit"], tmp_path / "spm", targets="mlp", stages=0, rank=4, **QUICK)
    result = export(tmp_path / "spm", tmp_path / "portable", form="portable")
    assert 0 <= result.difference <= 1e-5
    assert "pixel_values of 2 x" in result.compared


def test_opened_experts_are_refused_by_name(checkpoints, tmp_path):
    convert(checkpoints["mixtral"], tmp_path / "spm", targets="mlp", stages=0, rank=2, **QUICK)
    for form in ("portable", "onnx", "torch"):
        with pytest.raises(UnsupportedLayerError, match=r"model\.layers\.0\.mlp\.experts and 1 more: .*--format dense"):
            export(tmp_path / "spm", tmp_path / form, form=form)
        assert not (tmp_path / form).exists()


def test_one_that_differs_does_not_appear(sums, tmp_path, monkeypatch):
    module = portable.Portable.module
    wrong = "y = y if self.bias is None else y + self.bias"
    monkeypatch.setattr(portable.Portable, "module", lambda *args: module(*args).replace(wrong, "y = 1.01 * y"))
    with pytest.raises(FitError, match="differs from"):
        export(sums["lowrank"], tmp_path / "portable", form="portable")
    assert not (tmp_path / "portable").exists()


def test_half_precision(checkpoints, tmp_path):
    convert(checkpoints["llama-bf16"], tmp_path / "spm", targets="mlp", dtype="float32", **QUICK)
    result = export(tmp_path / "spm", tmp_path / "portable", form="portable")
    assert 0 <= result.difference <= result.tolerance == 0.1


def test_sentence_transformers_takes_it(minilm_exported):
    """That package is no dependency: where it is missing this says so."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    converted, result = minilm_exported
    texts = ["a river in spring", "the parliament met", "rivers"]
    own = sentence_transformers.SentenceTransformer(str(result.output), trust_remote_code=True, device="cpu").encode(texts)
    import spmconvert  # noqa: F401

    expected = sentence_transformers.SentenceTransformer(str(converted), device="cpu").encode(texts)
    assert abs(own - expected).max() < 1e-5


@pytest.fixture
def minilm_exported(checkpoints, tmp_path):
    """A tiny BERT as a sentence-transformers directory, converted and exported."""
    from tests.commands.sentences import sentence_directory

    source = sentence_directory(checkpoints["bert"], tmp_path / "sentences")
    convert(source, tmp_path / "spm", targets="mlp", stages=0, rank=4, **QUICK)
    return tmp_path / "spm", export(tmp_path / "spm", tmp_path / "portable", form="portable")
