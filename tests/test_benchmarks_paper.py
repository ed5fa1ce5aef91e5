"""The paper's experiments run, at sizes that take no time, and what they compare is what they say."""

import json

import pytest
import torch

from benchmarks.paper.__main__ import main
from benchmarks.paper.classification import Classification, sentences
from benchmarks.paper.compositional import label, perceptron
from benchmarks.paper.settings import EXPERIMENTS, load
from benchmarks.paper.shakespeare import Transformer
from benchmarks.paper.structures import GENERAL, LINEARS, NARROW, hidden_width, parameters

TINY = ["--timed-widths", "--seeds", "0", "1", "--repetitions", "2"]


def run(tmp_path, *arguments):
    main([*map(str, arguments), "--json", str(tmp_path / "r.json")])
    return json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_structure_has_rates(name):
    settings, _ = load(name, data=None if name == "compositional" else [])
    assert set(settings.rates) == set(LINEARS)


def test_compositional(tmp_path, capsys):
    few = ["--steps", 40, "--seeds", 0, "--repetitions", 2]
    result = run(tmp_path, "compositional", "--widths", 16, "--timed-widths", 8, *few)
    rows = [row for row in result["rows"] if row["width"] == 16]
    assert [row["structure"] for row in rows] == [*LINEARS] * 4
    for dense, narrow, general, rotation in (rows[first : first + 4] for first in range(0, 16, 4)):
        assert narrow["parameters"] <= general["parameters"] < dense["parameters"]
        assert rotation["parameters"] < general["parameters"]
        assert general["dense/this"] == pytest.approx(dense["milliseconds"] / general["milliseconds"])
        # ten classes about equally many
        assert general["mean"] > 0.2
    assert all("mean" not in row for row in result["rows"] if row["width"] == 8)
    assert "The paper's claim: improved accuracy" in capsys.readouterr().out


def test_teachers_differ_in_their_matrix_only():
    inputs = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for teacher in ("pairwise", "shuffled", "dense"):
        torch.manual_seed(1)
        found[teacher] = label(inputs, teacher, 10)
        assert torch.bincount(found[teacher], minlength=10).min() > 100
    assert (found["pairwise"] == found["shuffled"]).float().mean() < 0.5
    torch.manual_seed(1)
    assert torch.equal(found["pairwise"], label(inputs, "pairwise", 10))


def test_equal_size_is_the_largest_that_fits():
    def build(hidden, linear):
        return perceptron(64, 10, hidden, linear)

    limit = parameters(build(64, LINEARS[GENERAL]))
    hidden = hidden_width(build, 64, NARROW, 1)
    assert parameters(build(hidden, LINEARS[NARROW])) <= limit < parameters(build(hidden + 1, LINEARS[NARROW]))


def test_classification_of_labelled_texts(tmp_path):
    words = {"sport": "goal match", "trade": "bank share"}
    lines = [json.dumps({"text": f"{word} {index}", "label": name}) for index in range(80) for name, word in words.items()]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("\n".join(lines))
    files = ["--data", tmp_path / "train.jsonl", "--test", tmp_path / "test.jsonl"]
    result = run(tmp_path, "classification", *files, "--widths", 64, "--steps", 60, *TINY)
    for row in result["rows"]:
        assert row["mean"] == sum(seed["accuracy"] for seed in row["seeds"]) / 2 == 1
    assert result["rows"][0]["task"] == "140 texts, 2 labels"
    assert result["settings"]["experiment"]["data"] == ["train.jsonl"]


def test_sentences_of_articles(tmp_path):
    text = f" \n = First = \n \n {'a ' * 30}. {'b ' * 30}. \n = = Part = = \n {'c ' * 30}\n = Second = \n {'d ' * 30}\n"
    assert [(part.strip()[0], article) for part, article in sentences(text)] == [
        ("a", "First"),
        ("b", "First"),
        ("c", "First"),
        ("d", "Second"),
    ]
    (tmp_path / "articles.txt").write_text(text * 8)
    (task,) = Classification([tmp_path / "articles.txt"], classes=1, batch_size=4).tasks(16, 0)
    assert task.name == "18 texts, 1 labels"
    assert task.batch(torch.Generator())[0].square().mean().item() == pytest.approx(1)


def test_shakespeare(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not " * 400)
    few = ["--timed-widths", "--seeds", 0, "--repetitions", 2, "--steps", 50]
    result = run(tmp_path, "shakespeare", "--data", tmp_path / "text.txt", "--widths", 16, *few)
    assert result["measure"] == "bits a character"
    for row in result["rows"]:
        # without context this text has 2.6 bits a character
        assert row["mean"] < 2.3


@pytest.mark.parametrize("structure", LINEARS)
def test_transformer_is_causal(structure):
    torch.manual_seed(0)
    model = Transformer(5, 8, 16, LINEARS[structure])
    ids = torch.randint(5, (2, 8))
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 5
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
