"""Every check of verify passes on a fresh conversion and fails on the damage it is there for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from spmconvert.commands import verify as verification
from spmconvert.commands.convert import convert
from spmconvert.commands.report import report
from spmconvert.commands.verify import verify
from spmconvert.errors import ModelNotFoundError
from spmconvert.reporting.files import write_report
from tests.support import CODE_OF_ITS_OWN

CHECKS = ["files", "hashes", "shapes", "finite values", "untouched tensors", "fresh process", "recorded outputs"]


@pytest.fixture(scope="module")
def reported(checkpoints, tmp_path_factory):
    """A converted model with its report."""
    output = tmp_path_factory.mktemp("verified") / "gpt2-spm"
    convert(checkpoints["gpt2"], output, **{"fit.iterations": 2})
    write_report(report(output, seconds=0), output, None)
    return output


@pytest.fixture
def damaged(reported, tmp_path):
    """A copy that a test may damage."""
    copy = tmp_path / "copy"
    shutil.copytree(reported, copy)
    return copy


@pytest.fixture
def no_process(monkeypatch):
    """Leave the fresh process out where a test is about something else."""
    monkeypatch.setattr(verification, "run_fresh", lambda *_: {"architecture": "-", "layers": 0, "values": [0.0] * 8})


def outcomes(checks):
    return {check.name: check.outcome for check in checks}


def change(directory, pick, make):
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if pick(name))
    tensors[name] = make(tensors[name])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return name


def test_a_reported_conversion_passes_every_check(reported):
    checks = verify(reported)
    assert [check.name for check in checks] == CHECKS
    assert set(outcomes(checks).values()) == {"ok"}, checks
    assert "GPT2LMHeadModel with 4 SPM layers" in checks[5].detail


@pytest.mark.parametrize("name", ["lowrank", "mixed"])
def test_every_kind_of_term_passes_the_checks(sums, name):
    checks = verify(sums[name])
    assert set(outcomes(checks).values()) == {"ok", "skipped"}, checks
    assert {check.name for check in checks if check.outcome == "skipped"} == {"recorded outputs"}
    assert "LlamaForCausalLM with 9 SPM layers" in checks[5].detail


@pytest.mark.parametrize("part", ["weight", "lowrank.down.weight", "sparse24.positions"])
def test_shapes_of_every_tensor_are_compared_with_the_map(sums, tmp_path, no_process, part):
    copy = tmp_path / "copy"
    shutil.copytree(sums["sparse24+lowrank"], copy)
    name = change(
        copy, lambda name: name.endswith(f"up_proj.{part}"), lambda tensor: tensor.repeat(2, *[1] * (tensor.ndim - 1))
    )
    found = {check.name: check for check in verify(copy)}
    assert found["shapes"].outcome == "FAILED"
    assert name in found["shapes"].detail


def test_a_tensor_more_in_a_replaced_layer_is_named(sums, tmp_path, no_process):
    copy = tmp_path / "copy"
    shutil.copytree(sums["lowrank"], copy)
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("lowrank.up.weight")).replace("lowrank.up.weight", "bias")
    save_file({**tensors, name: torch.ones(3)}, copy / "model.safetensors", {"format": "pt"})
    found = {check.name: check for check in verify(copy)}
    assert found["shapes"].outcome == "FAILED"
    assert name in found["shapes"].detail


def test_a_changed_stage_is_found_by_hash_and_leaves_the_record_behind(damaged, no_process):
    change(damaged, lambda name: name.endswith("scale_in"), lambda tensor: tensor * 2)
    found = outcomes(verify(damaged))
    assert found["hashes"] == "FAILED"
    assert found["untouched tensors"] == "ok"
    # the report is of other weights
    assert found["recorded outputs"] == "skipped"


def test_an_untouched_tensor_that_differs_is_named(damaged, no_process):
    name = change(damaged, lambda name: "wte" in name, lambda tensor: tensor + 1)
    check = verify(damaged)[4]
    assert check.outcome == "FAILED"
    assert name in check.detail


@pytest.mark.parametrize(
    ("trained", "tensor", "outcome"),
    [
        ("spm", "wte", "FAILED"),
        ("spm", "ln_1.weight", "FAILED"),
        ("norms", "ln_1.weight", "ok"),
        ("norms", "attn.c_attn.weight", "FAILED"),
        ("all", "attn.c_attn.weight", "ok"),
    ],
)
def test_a_finetune_excuses_what_it_trained_and_nothing_else(damaged, no_process, trained, tensor, outcome):
    name = change(damaged, lambda name: tensor in name, lambda values: values + 1)
    content = json.loads((damaged / "spm.json").read_text())
    content["finetune"] = [{"recipe": {"train": trained}, "data_sha256": "0"}]
    (damaged / "spm.json").write_text(json.dumps(content))
    check = verify(damaged)[4]
    assert check.outcome == outcome
    assert (name in check.detail) == (outcome == "FAILED")


@pytest.mark.parametrize("content", ["", "{listed}"])
def test_a_list_of_hashes_that_leaves_files_out_fails(damaged, no_process, content):
    file = damaged / "checksums.sha256"
    listed = [line for line in file.read_text().splitlines() if "model.safetensors" not in line]
    file.write_text(content.format(listed="\n".join(listed) + "\n"))
    check = verify(damaged)[1]
    assert check.outcome == "FAILED"
    assert "model.safetensors" in check.detail


@pytest.mark.parametrize(
    ("change_provenance", "where"),
    [
        (lambda content: content.clear(), "'spmconvert_version'"),
        (lambda content: content["source"].pop("sha256"), "'source.sha256'"),
        (lambda content: content["source"].update(name=3), "'source.name'"),
        (lambda content: content.update(recipe=None), "'recipe'"),
        (lambda content: content.update(layers=[{"name": "a"}]), "'layers.0.dense_parameters'"),
        (lambda content: content["layers"].pop(), "do not name the same layers"),
        (lambda content: content.update(finetune=[{}]), "'finetune.0.recipe'"),
        (lambda content: content.update(calibration={}), "'calibration.file_sha256'"),
    ],
)
def test_provenance_that_later_commands_cannot_read_fails(damaged, change_provenance, where):
    content = json.loads((damaged / "spm.json").read_text())
    change_provenance(content)
    (damaged / "spm.json").write_text(json.dumps(content))
    (check,) = verify(damaged)
    assert (check.name, check.outcome) == ("files", "FAILED")
    assert where in check.detail
    assert "\n" not in check.detail


@pytest.mark.parametrize(
    ("entry", "term", "words"),
    [
        ({}, {"stages": -1}, "stages is -1"),
        ({"bias": 3}, {}, "bias 3"),
        ({}, {"width": 2}, "width is 2"),
        ({}, {"variant": 1}, "variant is 1"),
        ({}, {"kind": "unknown"}, "no kind of term 'unknown'"),
        ({}, {"rank": 2}, "a spm term has"),
        ({"terms": []}, {}, "it needs at least one"),
        ({"terms": 3}, {}, "terms are 3"),
        ({"stages": 3}, {}, "'stages'"),
    ],
)
def test_a_layer_map_that_describes_no_layer_fails(damaged, entry, term, words):
    config = json.loads((damaged / "config.json").read_text())
    name = "transformer.h.0.mlp.c_fc"
    layer = config["quantization_config"]["layers"][name]
    layer["terms"][0].update(term)
    layer.update(entry)
    (damaged / "config.json").write_text(json.dumps(config))
    (check,) = verify(damaged)
    assert (check.name, check.outcome) == ("files", "FAILED")
    assert name in check.detail
    assert words in check.detail


def test_a_checkpoint_without_provenance_is_checked_as_far_as_that_goes(damaged, no_process):
    (damaged / "spm.json").unlink()
    checks = verify(damaged)
    assert "without spm.json" in checks[0].detail
    found = outcomes(checks)
    assert [found[name] for name in ("files", "hashes", "shapes", "untouched tensors")] == ["ok", "ok", "ok", "skipped"]


def test_a_checkpoint_without_layers_is_refused_with_what_helps(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"]["layers"] = {}
    (damaged / "config.json").write_text(json.dumps(config))
    (check,) = verify(damaged)
    assert check.outcome == "FAILED"
    assert "no layer map" in check.detail


def test_values_that_are_not_finite_are_named(damaged, no_process):
    name = change(damaged, lambda name: name.endswith("scale_out"), lambda tensor: tensor / 0)
    check = verify(damaged)[3]
    assert check.outcome == "FAILED"
    assert name in check.detail


def test_shapes_that_disagree_with_the_map_are_named(damaged, no_process):
    name = change(damaged, lambda name: name.endswith("scale_in"), lambda tensor: tensor[:-1].contiguous())
    check = verify(damaged)[2]
    assert check.outcome == "FAILED"
    assert name in check.detail


def test_outputs_that_changed_are_found(reported, no_process):
    found = verify(reported)
    assert outcomes(found)["recorded outputs"] == "FAILED"
    assert "tolerance 0.001" in found[-1].detail


def test_a_source_that_is_gone_is_skipped_and_said(damaged, tmp_path, no_process):
    content = json.loads((damaged / "spm.json").read_text())
    content["source"]["name"] = str(tmp_path / "gone")
    (damaged / "spm.json").write_text(json.dumps(content))
    check = verify(damaged)[4]
    assert check.outcome == "skipped"
    assert "gone" in check.detail


def test_a_checkpoint_that_does_not_load_fails_in_the_fresh_process(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (damaged / "config.json").write_text(json.dumps(config))
    check = verify(damaged)[5]
    assert (check.name, check.outcome) == ("fresh process", "FAILED")
    assert "NoSuchModel" in check.detail


@pytest.mark.usefixtures("typed_ahead")
def test_code_in_a_checkpoint_never_runs(damaged, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (damaged / "own.py").write_text(CODE_OF_ITS_OWN.format(mark=str(tmp_path / "mark")))
    config = json.loads((damaged / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (damaged / "config.json").write_text(json.dumps({**config, **own}))
    assert outcomes(verify(damaged))["fresh process"] == "ok"
    (damaged / "config.json").write_text(json.dumps({**config, **own, "model_type": "own"}))
    check = next(check for check in verify(damaged) if check.name == "fresh process")
    assert check.outcome == "FAILED"
    assert "it needs code of its own, which is never run" in check.detail
    assert "\n" not in check.detail
    assert not (tmp_path / "mark").exists()


def test_files_that_cannot_be_opened_end_the_checks(damaged, tmp_path):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    checks = verify(damaged)
    assert [(check.name, check.outcome) for check in checks] == [("files", "FAILED")]
    with pytest.raises(ModelNotFoundError):
        verify(tmp_path / "nothing")


def test_without_hashes_that_check_is_skipped(damaged, no_process):
    (damaged / "checksums.sha256").unlink()
    assert outcomes(verify(damaged))["hashes"] == "skipped"


def test_where_memory_does_not_suffice_files_are_checked_and_the_rest_is_skipped(reported, monkeypatch):
    monkeypatch.setattr(verification, "free_memory", lambda _: 1000)
    monkeypatch.setattr(verification, "run_fresh", lambda *_: pytest.fail("the model was loaded"))
    checks = verify(reported)
    assert outcomes(checks) == dict.fromkeys(CHECKS[:-2], "ok") | {"fresh process": "skipped"}
    assert "of memory, 1.0 kB is free; verify where there is more" in checks[-1].detail
    monkeypatch.setattr(verification, "free_memory", lambda _: None)
    monkeypatch.setattr(verification, "run_fresh", lambda *_: {"architecture": "-", "layers": 0, "values": [0.0] * 8})
    assert "skipped" not in outcomes(verify(reported)).values()
