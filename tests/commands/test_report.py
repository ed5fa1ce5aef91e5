"""The workflow on tiny models: what is measured, on which rows, and what is named as missing."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace

import pytest

from spmconvert.checkpoint import card as cards
from spmconvert.checkpoint.converted import open_converted
from spmconvert.commands.convert import convert
from spmconvert.commands.report import report
from spmconvert.data.calibration import load_rows
from spmconvert.errors import CheckpointError, CorruptCheckpointError, NotWritableError, OptionError
from spmconvert.model.architecture import load_config
from spmconvert.model.loading import load
from spmconvert.recipe.recipe import Recipe
from spmconvert.reporting import files
from spmconvert.reporting.comparison import rows
from spmconvert.reporting.rows import evaluation_rows
from spmconvert.reporting.schema import NotMeasured, read_report
from spmconvert.reporting.summary import findings, key_figures
from tests.support import QUICK, raw_tensors

# one worker makes the report that both files read
pytestmark = pytest.mark.xdist_group("report")


def with_finetune(directory, digest):
    file = directory / "spm.json"
    content = json.loads(file.read_text())
    run = {
        "steps": 4,
        "tokens": 512,
        "objective": "logits",
        "start_loss": 2.0,
        "best_loss": 1.5,
        "data_sha256": digest,
        "recipe": {"train": "spm"},
        "seed": 0,
        "stopped": "",
        "history": [
            {"step": 0, "tokens": 0, "held_out_loss": 2.0, "held_out_tokens": 70},
            {"step": 4, "tokens": 512, "held_out_loss": 1.5, "perplexity": 4.5},
        ],
        "spmconvert_version": "0.1.0",
        "torch_version": "2.13.0",
    }
    file.write_text(json.dumps({**content, "finetune": [run]}))


def test_report_measures_a_causal_model(quick_report):
    found = quick_report
    assert [row.tokens for row in found.timing if row.what == "forward"] == [1, 16, 128, 1024]
    assert [row.what for row in found.timing][-1] == "generate"
    assert all(row.dense.p20 <= row.dense.p50 <= row.dense.p80 for row in found.timing)
    metrics = {metric.key: metric for metric in found.quality[0].metrics}
    assert list(metrics) == ["kl", "top1", "perplexity"]
    assert metrics["kl"].converted > 0
    assert metrics["perplexity"].dense > 1
    assert 0 <= metrics["top1"].converted <= 1
    assert metrics["kl"].samples == found.quality[0].tokens
    # the last token of a row has nothing after it
    assert metrics["perplexity"].samples == found.quality[0].tokens - found.quality[0].rows
    assert [text.domain for text in found.quality] == ["first", "other"]
    assert len(found.generations) == 3
    assert found.not_measured == ()


def test_the_untouched_model_is_a_candidate_without_loss(quick_report):
    by_key = {candidate.key: candidate for candidate in quick_report.candidates}
    assert list(by_key) == ["dense", "spm", "svd", "2:4", "int8-weight-only", "int8-dynamic"]
    untouched = {metric.key: metric.converted for metric in by_key["dense"].metrics}
    assert untouched["kl"] == pytest.approx(0, abs=1e-6)
    assert untouched["top1"] == 1
    assert by_key["spm"].metrics == quick_report.quality[0].metrics
    assert by_key["svd"].layer_parameters <= by_key["spm"].layer_parameters
    assert by_key["svd"].metrics[0].converted > 0
    assert by_key["2:4"].latency.samples == by_key["spm"].latency.samples


def test_int8_of_the_untouched_model_is_among_the_candidates(quick_report, gpt2_spm, checkpoints):
    by_key = {candidate.key: candidate for candidate in quick_report.candidates}
    disk = quick_report.quantity("bytes on disk", "whole model")
    assert (by_key["dense"].bytes, by_key["spm"].bytes) == (disk.dense, disk.converted)
    kl = {key: one.metrics[0].converted for key, one in by_key.items()}
    assert by_key["dense"].metrics[0].key == "kl"
    for key in ("int8-weight-only", "int8-dynamic"):
        assert by_key[key].parameters == by_key["dense"].parameters
        # all matrices but embeddings and head, which are a third of this one
        assert 0.4 * disk.dense < by_key[key].bytes < 0.7 * disk.dense
        assert 0 < kl[key] < min(kl["spm"], kl["svd"], kl["2:4"])
        assert by_key[key].latency.samples == by_key["spm"].latency.samples
    sentences = [said for said in findings(quick_report) if "of the untouched model" in said]
    assert len(sentences) == 2
    assert f"with {by_key['spm'].bytes / by_key['int8-dynamic'].bytes:.2f} times its bytes" in sentences[1]


def test_int8_is_left_out_by_name_where_torchao_is_missing(gpt2_spm, other_text, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    found = report(gpt2_spm, data=other_text, baselines=True, quick=True, rows=2, seconds=0)
    assert [candidate.key for candidate in found.candidates] == ["dense", "spm", "svd", "2:4"]
    (missing,) = (one for one in found.not_measured if "int8" in one.what)
    assert missing.what == "int8 weight-only and int8 dynamic of the untouched model"
    assert "pip install 'spmconvert[quant]'" in missing.reason
    assert any("pip install 'spmconvert[quant]'" in said for said in findings(found))
    with pytest.raises(OptionError, match=r"pip install 'spmconvert\[quant\]'"):
        report(gpt2_spm, baselines=True, int8=True)
    with pytest.raises(OptionError, match="add --baselines"):
        report(gpt2_spm, int8=False)
    monkeypatch.undo()
    without = report(gpt2_spm, data=other_text, baselines=True, quick=True, int8=False, rows=2, seconds=0)
    assert len(without.candidates) == 4
    assert not any("int8" in one.what for one in without.not_measured)


def test_a_metric_that_is_clear_counts_where_the_first_one_is_open(quick_report):
    def candidate(key, *values):
        found = next(one for one in quick_report.candidates if one.key == key)
        metrics = (
            metric.model_copy(update={"converted": value, "standard_error": error, "higher_is_better": True})
            for metric, value, error in zip(found.metrics, values, (0.5, 0.001), strict=False)
        )
        return found.model_copy(update={"metrics": tuple(metrics)})

    candidates = (candidate("spm", 0.94, 0.87), candidate("svd", 0.95, 0.91))
    found = quick_report.model_copy(update={"candidates": candidates})
    first, second = (metric.title for metric in candidates[0].metrics)
    (sentence,) = (said for said in findings(found) if "compared with" in said)
    assert f"level by {first}" in sentence
    assert f"worse by {second}" in sentence
    times = [one.latency.p50 for one in candidates]
    assert f"and {times[0] / times[1]:.2f} times its time for {candidates[0].tokens} tokens" in sentence
    figure = key_figures(found)[-1]
    assert (figure.value, figure.tone) == ("worse", "bad")
    assert second in figure.detail


def test_sizes_add_up(quick_report, gpt2_spm):
    whole, layers = (quick_report.quantity("parameters", scope) for scope in ("whole model", "replaced layers"))
    assert whole.dense - whole.converted == layers.dense - layers.converted
    model = load(gpt2_spm)
    assert whole.converted == sum(parameter.numel() for parameter in model.parameters())
    disk = quick_report.quantity("bytes on disk", "whole model")
    assert disk.converted == (gpt2_spm / "model.safetensors").stat().st_size
    flops = quick_report.quantity("FLOPs per token", "whole model")
    # eight layers of the blocks and the output head
    assert flops.dense == 2 * (2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 32 * 96)
    assert quick_report.quantity("peak memory", "whole model").dense > 0


@pytest.mark.parametrize("name", ["lowrank", "sparse24", "mixed"])
def test_sizes_leave_out_marks_and_positions_but_for_bytes(sums, name):
    found = report(sums[name], seconds=0)
    converted = open_converted(sums[name])
    model = load(sums[name])
    sizes = {(quantity.what, quantity.scope): quantity.converted for quantity in found.quantities}
    assert sizes["parameters", "whole model"] == sum(parameter.numel() for parameter in model.parameters())
    inside = [parameter for layer in converted.layers for parameter in model.get_submodule(layer).parameters()]
    assert sizes["parameters", "replaced layers"] == sum(parameter.numel() for parameter in inside)
    files = sum(file.stat().st_size for file in sums[name].glob("*.safetensors"))
    assert sizes["bytes on disk", "whole model"] == files
    assert sizes["FLOPs per token", "replaced layers"] == sum(
        spec.design.flops_per_token() for spec in converted.layers.values()
    )
    assert {row.name: row.design for row in found.layers} == {
        layer: spec.design.describe() for layer, spec in converted.layers.items()
    }


def test_report_is_read_back_and_refused_when_it_does_not_fit(quick_report, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(quick_report.model_dump_json())
    assert read_report(file) == quick_report
    content = json.loads(file.read_text())
    for change, word in (
        ({"schema_version": 2}, "schema_version 2"),
        ({"surprise": 1}, "surprise"),
        ({"layers": [{"name": "x"}]}, "layers"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=word):
            read_report(file)
    file.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_report(file)


def test_missing_inputs_are_named_and_nothing_is_guessed(gpt2_spm, text, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(gpt2_spm, moved)
    file = moved / "spm.json"
    content = json.loads(file.read_text())
    content["source"]["name"] = str(tmp_path / "gone")
    file.write_text(json.dumps(content))
    found = report(moved, data=text, baselines=True, seconds=0)
    assert found.quality == found.timing == found.candidates == found.generations == ()
    assert not found.model.source_reachable
    assert [one.what for one in found.not_measured] == ["everything that needs the dense model: quality, time, memory"]
    assert "--teacher" in found.not_measured[0].remedy
    # sizes need no source
    assert found.quantity("parameters", "whole model").converted > 0


def test_without_text_quality_is_not_measured(gpt2_spm):
    found = report(gpt2_spm, seconds=0)
    assert found.quality == ()
    assert {one.what for one in found.not_measured} == {"quality", "time and memory"}
    assert any("--data" in one.remedy for one in found.not_measured)


def test_another_teacher_is_refused(gpt2_spm, checkpoints):
    with pytest.raises(CheckpointError, match="not the checkpoint"):
        report(gpt2_spm, teacher=str(checkpoints["gpt2"].parent / "llama"), seconds=0)


def test_rows_of_the_calibration_text_that_were_fitted_are_not_measured(gpt2_spm, text):
    opened = open_converted(gpt2_spm)
    config = load_config(gpt2_spm)
    held_out, fitted = (opened.provenance["calibration"][f"{part}_rows"] for part in ("held_out", "fitted"))
    rows = evaluation_rows(opened, config, text, "first", count=10_000)
    assert len(rows.rows) > held_out
    assert f"it fitted {fitted}" in rows.origin
    few = evaluation_rows(opened, config, text, "first", count=held_out + 1)
    assert [row.tolist() for row in few.rows] == [row.tolist() for row in rows.rows[: held_out + 1]]
    recipe = Recipe.model_validate(opened.provenance["recipe"])
    seen = {tuple(row.tolist()) for row in load_rows(gpt2_spm, config, recipe.calibration, recipe.seed).fitted}
    assert seen
    assert not seen & {tuple(row.tolist()) for row in rows.rows}


def test_rows_equal_to_a_fitted_one_are_not_measured(gpt2_spm, text, monkeypatch):
    def repeated(*arguments, **options):
        found = load_rows(*arguments, **options)
        return replace(found, unused=[found.fitted[0], *found.unused])

    arguments = (open_converted(gpt2_spm), load_config(gpt2_spm), text, "first")
    expected = evaluation_rows(*arguments, count=10_000)
    monkeypatch.setattr("spmconvert.reporting.rows.load_rows", repeated)
    found = evaluation_rows(*arguments, count=10_000)
    assert [row.tolist() for row in found.rows] == [row.tolist() for row in expected.rows]


def test_a_calibration_text_without_another_row_has_no_quality(gpt2_spm, text, monkeypatch):
    def all_fitted(*arguments, **options):
        found = load_rows(*arguments, **options)
        return replace(found, held_out=found.fitted[: len(found.held_out)], unused=[])

    monkeypatch.setattr("spmconvert.reporting.rows.load_rows", all_fitted)
    found = evaluation_rows(open_converted(gpt2_spm), load_config(gpt2_spm), text, "first", count=64)
    assert isinstance(found, NotMeasured)
    assert "every row of it was fitted" in found.reason


def test_a_calibration_split_that_cannot_be_drawn_again_is_refused(gpt2_spm, text, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(gpt2_spm, changed)
    content = json.loads((changed / "spm.json").read_text())
    content["calibration"]["fitted_rows"] += 1
    (changed / "spm.json").write_text(json.dumps(content))
    rows = evaluation_rows(open_converted(changed), load_config(changed), text, "first", count=64)
    assert isinstance(rows, NotMeasured)
    assert "cannot be drawn again" in rows.reason


def test_a_text_that_was_trained_on_has_no_quality(gpt2_spm, other_text, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(gpt2_spm, tuned)
    with_finetune(tuned, hashlib.sha256(other_text.read_bytes()).hexdigest())
    found = report(tuned, data=other_text, seconds=0)
    assert found.quality == ()
    assert any("a finetune of this model used the text" in one.reason for one in found.not_measured)
    assert found.model.finetuned
    assert [point.held_out_loss for point in found.training[0].history] == [2.0, 1.5]
    content = json.loads((tuned / "spm.json").read_text())
    del content["finetune"][0]["best_loss"]
    (tuned / "spm.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="finetune in its provenance"):
        report(tuned, seconds=0)


def test_encoders_and_classifiers_have_their_own_measures(checkpoints, other_text, text, tmp_path):
    convert(checkpoints["bert"], tmp_path / "bert", calib=text, **QUICK)
    found = report(tmp_path / "bert", data=other_text, seconds=0, rows=8)
    metrics = {metric.key: metric for metric in found.quality[0].metrics}
    assert list(metrics) == ["similarity", "embedding", "states"]
    assert metrics["similarity"].samples == 8
    assert metrics["similarity"].standard_error > 0
    assert 0 < metrics["embedding"].converted < 1
    assert found.generations == ()


def test_a_bare_calibration_compares_with_unweighted_svd(checkpoints, other_text, tmp_path):
    convert(checkpoints["gpt2"], tmp_path / "o", **{"fit.iterations": 1})
    found = report(tmp_path / "o", data=other_text, baselines=True, rows=4, seconds=0)
    assert found.model.calibration is None
    assert "Frobenius" in found.layer_errors_on
    assert [candidate.latency for candidate in found.candidates] == [None] * 6


def test_errors_that_fits_did_not_go_for_are_not_held_against_them(checkpoints, text, tmp_path, monkeypatch):
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    convert(
        checkpoints["gpt2"],
        tmp_path / "o",
        keep=0.5,
        structures="lowrank",
        allow_slower=True,
        sequential=True,
        calib=text,
        refine=0,
        **{"calibration.rows": 16},
    )
    found = report(tmp_path / "o", seconds=0)
    aims = "fits weigh outputs by what their errors cost the model and make up for the layers converted before, which"
    assert aims in found.layer_errors_on
    assert any(aims in sentence for sentence in findings(found) if sentence.startswith("Layer by layer"))
    figure = key_figures(found)[-1]
    assert aims in figure.detail
    assert figure.tone == "plain"


@pytest.mark.parametrize("name", ["gpt2", "llama-bf16"])
def test_baselines_are_refined_as_the_conversion_was(checkpoints, text, other_text, tmp_path, name):
    options = {"rank": 4, "stages": 0, "refine": 6, "calibration.rows": 24}
    convert(checkpoints[name], tmp_path / "o", targets="mlp", calib=text, **options)
    before = raw_tensors(checkpoints[name])
    found, quick = (
        report(tmp_path / "o", data=other_text, baselines=True, quick=quick, rows=8, seconds=0) for quick in (0, 1)
    )
    assert raw_tensors(checkpoints[name]) == before
    alike, left_out = ({one.key: one for one in result.candidates} for result in (found, quick))
    for key in ("svd", "2:4"):
        assert "refined alike" in alike[key].note
        assert "not refined (--quick)" in left_out[key].note
        kl = [next(m.converted for m in one[key].metrics if m.key == "kl") for one in (alike, left_out)]
        assert kl[0] != kl[1]
        assert alike[key].layer_parameters == left_out[key].layer_parameters


def test_baselines_without_the_calibration_text_are_named(gpt2_spm, other_text, tmp_path):
    found = report(gpt2_spm, baselines=True, calibration=other_text, seconds=0)
    assert found.candidates == ()
    assert any(one.what == "baselines" and "not the calibration text" in one.reason for one in found.not_measured)


def test_outputs_that_are_not_finite_are_an_error(gpt2_spm, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(gpt2_spm, broken)
    tensors = load_file(broken / "model.safetensors")
    next(value for name, value in tensors.items() if name.endswith("scale_out")).fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match="not finite"):
        report(broken, seconds=0)


def test_wrong_numbers_and_a_missing_harness_are_refused(gpt2_spm, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match="rows is 0"):
        report(gpt2_spm, rows=0)
    with pytest.raises(OptionError, match=r"spmconvert\[eval\]"):
        report(gpt2_spm, tasks=("hellaswag",))


def test_files_go_into_the_checkpoint_and_refresh_its_card(quick_report, gpt2_spm, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(gpt2_spm, place)
    before = (place / "README.md").read_text()
    page = files.write_report(quick_report, place, None)
    assert page == place / "report.html"
    once = (place / "README.md").read_text()
    assert once.startswith(before.rstrip())
    assert once.count(cards.REPORT_BEGIN) == once.count(cards.REPORT_END) == 1
    edited = once + "\nA line of mine.\n"
    (place / "README.md").write_text(edited)
    later = quick_report.model_copy(update={"created": "2030-01-02T00:00:00+00:00"})
    files.write_report(later, place, None)
    again = (place / "README.md").read_text()
    assert again == edited.replace(quick_report.created[:10], "2030-01-02")
    assert read_report(place / "report.json") == later
    run = {"steps": 4, "tokens": 512, "start_loss": 2.0, "best_loss": 1.5, "recipe": {"train": "spm"}}
    tuned = cards.finetuned_card(again, run)
    assert "## Measured" not in tuned
    assert cards.REPORT_BEGIN not in tuned
    assert "A line of mine." in tuned


def test_with_an_output_the_checkpoint_is_not_touched(quick_report, gpt2_spm, tmp_path):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in gpt2_spm.iterdir())
    files.write_report(quick_report, gpt2_spm, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in gpt2_spm.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritableError, match="-o"):
        files.write_report(quick_report, gpt2_spm, tmp_path / "file" / "below")


def test_a_report_is_no_companion_of_the_weights(quick_report, gpt2_spm, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(gpt2_spm, place)
    files.write_report(quick_report, place, None)
    names = {file.name for file in open_converted(place).checkpoint().companion_files()}
    assert not names & {"report.html", "report.json", "checksums.sha256", "spm.json"}
    assert "tokenizer.json" in names


def test_texts_of_one_name_are_told_apart(quick_report):
    text = quick_report.quality[0]
    other = text.model_copy(update={"sha256": "f" * 64})
    reports = [quick_report, quick_report.model_copy(update={"quality": (other,)})]
    named = [row for row in rows(reports) if f"on {text.text}" in row.what]
    assert len(named) == 2 * len(text.metrics)
    assert all(sum(value != "–" for value in row.values) == 1 for row in named)
    assert any("(ffffffff)" in row.what for row in named)
    assert all("(" not in row.what.split(" on ")[1] for row in rows([quick_report]) if f"on {text.text}" in row.what)
