"""What a conversion takes where nobody says what layers become: a budget that is a first try to keep.

Measured on all-MiniLM-L6-v2 and SmolLM2-135M (docs/results.md): faster, smaller and still close. Models of language lose
more by the same speed, so they are asked for less of it. Attention and a limit of size beside that of time (``--targets all
--speedup 1.2 --keep 0.55``) make an encoder a fifth smaller and faster still, and further from what it was.
"""

from typing import Any

from spmconvert.data.media import TENSOR_SUFFIX
from spmconvert.data.tokens import reads_packed, reads_tokens, row_length
from spmconvert.recipe.recipe import Budget, Recipe

FIRST_SPEEDUP, FIRST_SPEEDUP_OF_LANGUAGE = 1.2, 1.15
# the share of the layers that is kept where no time is measured
FIRST_KEPT = 0.5
# of a model that is too small to become so much faster
SECOND_BUDGET = Budget(keep=FIRST_KEPT, allow_slower=True)


def first_budget(recipe: Recipe, config: Any) -> Budget | None:
    """What is asked for where a recipe names neither designs nor a budget."""
    if recipe.names_designs:
        return None
    if recipe.calibration.file is None:
        # without data nothing else is sure to be better than to predict the mean
        return Budget(keep=FIRST_KEPT, structures=("lowrank",), sensitivity="none")
    if not reads_tokens(config) or recipe.calibration.file.suffix == TENSOR_SUFFIX:
        # a speed-up is timed on rows of tokens alone
        return Budget(keep=FIRST_KEPT)
    speedup = FIRST_SPEEDUP_OF_LANGUAGE if reads_packed(config) else FIRST_SPEEDUP
    return Budget(speedup=speedup, tokens=row_length(config, Budget().tokens))
