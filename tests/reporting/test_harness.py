"""Tasks of lm-evaluation-harness, where the extra is installed."""

import json

import pytest
from transformers import AutoTokenizer

from spmconvert.errors import OptionError
from spmconvert.model.loading import load
from spmconvert.reporting.harness import read_results, run_tasks

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
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install 'spmconvert[eval]'")
    tokenizer = AutoTokenizer.from_pretrained(gpt2_spm)
    models = load(gpt2_spm).eval(), load(checkpoints["gpt2"]).eval()
    (found,) = run_tasks(*models, tokenizer, (task,))
    # the same question six times, so the model is right on half of them whatever it answers
    assert (found.task, found.metric, found.converted, found.dense, found.samples) == ("local", "acc", 0.5, 0.5, 6)
    assert found.standard_error > 0
    with pytest.raises(OptionError, match="no-such-task"):
        run_tasks(models[0], None, tokenizer, ("no-such-task",))


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
