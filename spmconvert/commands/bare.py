"""What a conversion takes where nobody says what layers become: which of them, and a budget.

A first try is to be kept: faster, smaller and close. Measured on all-MiniLM-L6-v2 and SmolLM2-135M (docs/results.md): an
encoder is given a choice among attention and feed-forward layers, which costs less for the same speed than feed-forward
layers alone, and a limit of size beside that of time; models of language lose more by the same speed, so they are asked for
less of it, in their feed-forward layers.
"""

from typing import Any

from spmconvert.data.media import TENSOR_SUFFIX
from spmconvert.data.tokens import reads_packed, reads_tokens, row_length
from spmconvert.recipe.recipe import Budget, Recipe

FIRST_SPEEDUP, FIRST_SPEEDUP_OF_LANGUAGE = 1.2, 1.15
FIRST_TARGETS_OF_ENCODERS = ("all",)
# share of them that is kept beside that: a small model with a large vocabulary is a fifth smaller then
FIRST_KEPT_OF_ENCODERS = 0.55
# the share that is kept where no time is measured
FIRST_KEPT = 0.5
# of a model that is too small to become so much faster
SECOND_BUDGET = Budget(keep=FIRST_KEPT, allow_slower=True)


def with_first_targets(recipe: Recipe, config: Any) -> Recipe:
    """A recipe with targets where it names neither these nor a budget, and others than the default are better."""
    if recipe.names_designs or recipe.targets is not None or not _is_timed(recipe, config) or reads_packed(config):
        return recipe
    return recipe.model_copy(update={"targets": FIRST_TARGETS_OF_ENCODERS})


def first_budget(recipe: Recipe, config: Any) -> Budget | None:
    """What is asked for where a recipe, with its targets, names neither designs nor a budget."""
    if recipe.names_designs:
        return None
    if recipe.calibration.file is None:
        # without data nothing else is sure to be better than to predict the mean
        return Budget(keep=FIRST_KEPT, structures=("lowrank",), sensitivity="none")
    if not _is_timed(recipe, config):
        return Budget(keep=FIRST_KEPT)
    tokens = row_length(config, Budget().tokens)
    if reads_packed(config):
        return Budget(speedup=FIRST_SPEEDUP_OF_LANGUAGE, tokens=tokens)
    keep = FIRST_KEPT_OF_ENCODERS if recipe.targets == FIRST_TARGETS_OF_ENCODERS else None
    return Budget(speedup=FIRST_SPEEDUP, keep=keep, tokens=tokens)


def _is_timed(recipe: Recipe, config: Any) -> bool:
    """Whether a speed-up can be asked for: it is timed on rows of tokens alone."""
    file = recipe.calibration.file
    return file is not None and file.suffix != TENSOR_SUFFIX and reads_tokens(config)


def describe_taken(recipe: Recipe, budget: Budget) -> str:
    """What a recipe without designs is given, as the command line would take it."""
    targets = f"--targets {','.join(recipe.targets)} " if recipe.targets == FIRST_TARGETS_OF_ENCODERS else ""
    slower = " --allow-slower, for its size alone" if budget.allow_slower else ""
    return f"{targets}{budget.option}{slower}"
