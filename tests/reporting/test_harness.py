"""Tasks of lm-evaluation-harness, where the extra is installed."""

import json
import sys

import pytest
import yaml
from transformers import AutoTokenizer

from spmconvert.errors import CheckpointError, OptionError
from spmconvert.model.loading import load
from spmconvert.reporting.harness import read_results, run_command_line, run_tasks

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def task(tmp_path):
    """A task of six questions in a local file; half of the answers are the first choice."""
    questions = [{"question": "the cat", "choices": ["sat", "ran"], "answer": number % 2} for number in range(6)]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def test_both_models_run_a_task(gpt2_spm, checkpoints, task):
    tokenizer = AutoTokenizer.from_pretrained(gpt2_spm)
    models = load(gpt2_spm).eval(), load(checkpoints["gpt2"]).eval()
    (found,) = run_tasks(*models, tokenizer, (task,))
    # the same question six times, so the model is right on half of them whatever it answers
    assert (found.task, found.metric, found.converted, found.dense, found.samples) == ("local", "acc", 0.5, 0.5, 6)
    assert found.standard_error > 0
    with pytest.raises(OptionError, match="no-such-task"):
        run_tasks(models[0], None, tokenizer, ("no-such-task",))


def test_the_harness_own_command_line_finds_the_format(gpt2_spm, task, tmp_path, run):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local.yaml").write_text(yaml.safe_dump(task))
    place = ["--include_path", tmp_path / "tasks", "--device", "cpu"]
    # neither the options of the harness nor a comma in a path is ours to read
    directory = tmp_path / "a, b=c"
    directory.symlink_to(gpt2_spm)
    code, out, _ = run("eval", directory, "--tasks", "local", "--model_args", "dtype=float32", *place)
    assert code == 0
    assert "|acc" in out.replace(" ", "")
    assert "|0.5" in out.replace(" ", "")
    assert sys.argv[:2] == ["spmconvert", "eval"]


def test_what_the_harness_refuses_is_one_line(gpt2_spm, run, monkeypatch):
    import lm_eval.__main__ as harness

    def refuse():
        assert sys.argv[-2:] == ["--tasks", "no-such-task"]
        raise ValueError("Tasks not found: no-such-task\n\nmore")

    monkeypatch.setattr(harness, "cli_evaluate", refuse)
    monkeypatch.chdir(gpt2_spm.parent)
    code, out, error = run("eval", gpt2_spm.name, "--tasks", "no-such-task")
    assert (code, out) == (2, "")
    assert error == "error: lm_eval refuses this (Tasks not found: no-such-task); see lm_eval ls tasks\n"


def test_what_the_command_line_cannot_run_on_is_refused(gpt2_spm, checkpoints, run):
    with pytest.raises(CheckpointError, match="is not a converted checkpoint"):
        run_command_line(checkpoints["gpt2"], ["--tasks", "local"])
    for given in ("pretrained=gpt2", "dtype=auto,pretrained=gpt2", '{"pretrained": "gpt2"}'):
        with pytest.raises(OptionError, match="pretrained is given, and so is the directory"):
            run_command_line(gpt2_spm, ["--model_args", given])
    assert run("eval", gpt2_spm, "--no-such-option")[0] == 2


def test_a_missing_harness_is_named_with_its_extra(gpt2_spm, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"^eval needs lm-evaluation-harness.*spmconvert\[eval\]"):
        run_command_line(gpt2_spm, [])


def test_groups_and_variants_of_a_metric_are_told_apart():
    answer = {
        "results": {
            "sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "sums_easy": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.2, "exact_match,flexible": 0.75},
        },
        "group_subtasks": {"sums": ["sums_inner"], "sums_inner": ["sums_easy", "sums_hard"]},
        "n-samples": {"sums_easy": {"original": 9, "effective": 6}, "sums_hard": {"original": 5, "effective": 5}},
    }
    assert read_results(answer) == {
        ("sums", "acc"): (0.5, 0.1, 11),
        ("sums_easy", "exact_match, strict"): (0.25, 0.2, 6),
        ("sums_easy", "exact_match, flexible"): (0.75, None, 6),
    }
