"""The metadata of a model card: what is taken over from the source, and what is not."""

from huggingface_hub import ModelCard

from spmconvert.checkpoint.card import UNTOUCHED, finetuned_card, inherited_metadata, model_card

SOURCE = """---
license: apache-2.0
language: en
tags:
- sentence-transformers
library_name: sentence-transformers
model-index:
- name: scores of the dense model
---
# dense
"""


def card_of(file, source, refined=0):
    return model_card(
        source=source, source_sha256="0" * 64, inherited=inherited_metadata(file), rows=[], measured_on="no rows",
        refined=refined, sizes="", version="1",
    )  # fmt: skip


def test_licence_languages_and_tags_are_those_of_the_source(tmp_path):
    (tmp_path / "README.md").write_text(SOURCE)
    metadata = ModelCard(card_of(tmp_path / "README.md", "someone/dense")).data.to_dict()
    assert metadata == {
        "license": "apache-2.0",
        "language": "en",
        "base_model": "someone/dense",
        "library_name": "transformers",
        "tags": ["sentence-transformers", "spmconvert"],
    }


def test_a_source_without_readable_metadata_hands_nothing_on(tmp_path):
    file = tmp_path / "README.md"
    plain = {"library_name": "transformers", "tags": ["spmconvert"]}
    for content in (None, "# no header", "---\n- a list\n---\n", "---\nlicense: [\n---\n"):
        if content is not None:
            file.write_text(content)
        assert ModelCard(card_of(file, "dense")).data.to_dict() == plain


def test_a_single_tag_is_one_tag(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: text\n---\n")
    assert inherited_metadata(tmp_path / "README.md") == {"tags": ["text"]}


def test_a_card_says_which_tensors_are_those_of_the_source(tmp_path):
    run = {"steps": 3, "tokens": 9, "start_loss": 1.0, "best_loss": 0.5}

    def finetuned(card, *scopes):
        for scope in scopes:
            card = finetuned_card(card, {**run, "recipe": {"train": scope}})
        return card

    card = card_of(tmp_path / "README.md", "dense")
    assert UNTOUCHED in card
    assert "refined" not in card
    refined = card_of(tmp_path / "README.md", "dense", refined=7)
    assert f"Beside them 7 norms and biases were refined. {UNTOUCHED}" in refined
    assert UNTOUCHED in finetuned(refined, "spm", "spm")
    for scopes in (["norms"], ["norms", "spm"], ["spm", "norms"]):
        found = finetuned(refined, *scopes)
        assert found.count("A finetune has trained norms and biases, too; all other tensors are") == 1
        assert UNTOUCHED not in found
    for scopes in (["all"], ["norms", "all"], ["all", "norms", "spm"], ["all", "all"]):
        found = finetuned(refined, *scopes)
        assert found.count("A finetune has trained all tensors.") == 1
        assert "byte for byte" not in found
