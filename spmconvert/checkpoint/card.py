"""The model card of a converted checkpoint: what it is, how to load it, what each layer kept and lost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from spmconvert.escaping import code, markdown

# what of the source's metadata is true of the converted model, too
INHERITED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "tags")
# what a finetune replaces
REPORT_BEGIN = "<!-- spmconvert report: begin -->"
REPORT_END = "<!-- spmconvert report: end -->"
UNTUNED = "The model has not been finetuned after the conversion."
UNTOUCHED = "All other tensors are byte for byte those of the source."
# of a finetune by what it trained; the new layers alone leave the others as they were
TRAINED = {
    "norms": "A finetune has trained norms and biases, too; all other tensors are byte for byte those of the source.",
    "all": "A finetune has trained all tensors.",
}


def inherited_metadata(card: Path) -> dict[str, Any]:
    """Licence, languages, datasets, task and tags from the card of the source; none where it has no readable metadata."""
    try:
        # a pipe would be waited for
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (OSError, ValueError, YAMLError, RecursionError):
        return {}
    tags = metadata.get("tags") or []
    inherited = {key: metadata[key] for key in INHERITED if metadata.get(key)}
    return {**inherited, "tags": tags if isinstance(tags, list) else [tags]}


def model_card(
    *,
    source: str,
    source_sha256: str,
    inherited: Mapping[str, Any],
    rows: Sequence[Any],
    measured_on: str,
    refined: int,
    sizes: str,
    version: str,
) -> str:
    """The card as Markdown with the metadata header the hub reads.

    Args:
        source: hub id of the dense checkpoint, or the name of its directory.
        source_sha256: content hash of the source.
        inherited: metadata of the source, as ``inherited_metadata`` gives it.
        rows: one ``LayerRecord`` a layer.
        measured_on: what the errors were measured on, in words.
        refined: number of norms and biases that refinement changed.
        sizes: parameters and bytes before and after, in words.
        version: version of spmconvert.
    """
    metadata = {
        **inherited,
        "base_model": source if "/" in source else None,
        "library_name": "transformers",
        "tags": [*inherited.get("tags", []), "spmconvert"],
    }
    header = ["---", ModelCardData(ignore_metadata_errors=True, **metadata).to_yaml(), "---"]
    table = ["| layer | in x out | kept | error | whitened SVD of equal size |", "|---|---|---|---|---|"]
    table += [
        f"| {code(row.name, cell=True)} | {row.in_features} x {row.out_features} "
        f"| {row.parameters / row.dense_parameters:.1%} | {row.error:.4f} "
        f"| {row.baseline_error:.4f} (rank {row.baseline_rank}) |"
        for row in rows
    ]
    body = [
        f"# {markdown(source)}, converted by spmconvert",
        "",
        f"{len(rows)} dense layers of {code(source)} (content hash `{source_sha256[:16]}`) are replaced by SPM layers",
        f"(Stagewise Pairwise Mixers, arXiv 2512.23905). {_refined(refined)}{UNTOUCHED}",
        "",
        "```python",
        "import spmconvert  # registers the format; pip install spmconvert",
        "from transformers import AutoModel",
        "",
        'model = AutoModel.from_pretrained("path/of/this/directory")',
        "```",
        "",
        f"{sizes} Written by spmconvert {version}. {UNTUNED}",
        "",
        f"Errors are E‖y - ŷ‖² / E‖y‖² of each layer's output, {measured_on}.",
        "",
    ]
    return "\n".join([*header, "", *body, *table, ""])


def _refined(count: int) -> str:
    """What refinement changed beside the new layers, in words and with a space behind; empty for nothing."""
    return f"Beside them {count} norms and biases were refined. " if count else ""


def with_report(card: str, section: str) -> str:
    """A card with a report's section in the place of an older one, or at the end; an empty section takes it out."""
    before, begin, rest = card.partition(REPORT_BEGIN)
    _, end, after = rest.partition(REPORT_END)
    marked = f"{REPORT_BEGIN}\n\n{section}\n\n{REPORT_END}" if section else ""
    if begin and end:
        return f"{before}{marked}{after}"
    return f"{card.rstrip()}\n\n{marked}\n" if marked else card


def finetuned_card(card: str, run: dict[str, Any]) -> str:
    """A card after one more finetune: what was reached takes the place of the sentence about none."""
    done = (
        f"It was distilled against its source for {run['steps']} steps, {run['tokens']:,} tokens; held-out loss a token "
        f"{run['start_loss']:.4g} before, {run['best_loss']:.4g} after. The errors below are from before."
    )
    # a report in it is one of the weights before
    card = with_report(card, "")
    trained = run["recipe"]["train"]
    if trained in TRAINED and TRAINED["all"] not in card:
        # a run before it may have trained norms
        card = card.replace(UNTOUCHED, TRAINED[trained]).replace(TRAINED["norms"], TRAINED[trained])
    return card.replace(UNTUNED, done) if UNTUNED in card else f"{card}\n{done}\n"
