"""Where measured curves are kept: one file a layer and part, named by everything that decides about it.

That is the checkpoint, class and dtype of the model, layer, calibration text and rows, and kind of sensitivity.
Nothing is ever deleted: a changed text or a new version leaves the old files behind.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.data.tokens import tokenizer_hash
from spmconvert.outputs.objective import objective_of
from spmconvert.plan.plan import LayerPlan
from spmconvert.recipe.recipe import Recipe
from spmconvert.system.caches import cache_directory, keep
from spmconvert.system.parsing import parse_json

# changes with anything that changes what a curve holds
CURVE_VERSION = 8
# low rank at every rank, designs that were fitted, and the model's response to errors
LOW_RANK, TERMS, RESPONSE = "lowrank", "terms", "response"


class _Curve(BaseModel):
    ranks: list[Annotated[int, Field(ge=1)]]
    errors: list[float]
    losses: list[float]

    @model_validator(mode="after")
    def _has_a_loss_a_rank(self) -> "_Curve":
        if not len(self.ranks) == len(self.errors) == len(self.losses) > 0:
            raise ValueError("as many ranks as errors and losses are needed")
        return self


class _Term(BaseModel):
    model_config = ConfigDict(extra="allow")
    kind: str


class _Fitted(BaseModel):
    terms: list[_Term]
    error: float
    loss: float


# what a file of each part has to be
_FORMS: dict[str, TypeAdapter[Any]] = {
    LOW_RANK: TypeAdapter(_Curve),
    TERMS: TypeAdapter(Annotated[list[_Fitted], Field(min_length=1)]),
    RESPONSE: TypeAdapter(Annotated[list[tuple[float, float]], Field(min_length=1)]),
}


@dataclass(frozen=True)
class CacheIdentity:
    """How a model is measured; its curves hold for no other class or dtype of the same checkpoint.

    Attributes:
        architecture: its class, which may be another than the checkpoint's while a model is loaded.
        dtype: of its weights.
    """

    architecture: str
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the model's products; that of most checkpoints where it is theirs."""
        found: torch.dtype = getattr(torch, "bfloat16" if self.dtype == "auto" else self.dtype)
        return found

    @classmethod
    def of_checkpoint(cls, source: Checkpoint, device: str) -> "CacheIdentity":
        """As ``spmconvert.model.loading.load_dense_model`` loads it."""
        return cls((source.config.get("architectures") or [""])[0], "float32" if device == "cpu" else "auto")

    @classmethod
    def of_model(cls, model: Any) -> "CacheIdentity":
        """As it is."""
        return cls(type(model).__name__, str(model.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class CurveCache:
    """Where curves are kept by part.

    Attributes:
        parts: what is kept of a layer.
        structures: kinds of terms that the recipe allows.
        shared: what decides about the curves of all layers.
    """

    parts: tuple[str, ...]
    structures: tuple[str, ...]
    shared: dict[str, Any]

    @classmethod
    def of(cls, source: Checkpoint, recipe: Recipe, identity: CacheIdentity, text: str | None) -> "CurveCache":
        """Where the curves of a conversion are, or will be; ``text`` is the hash of its calibration text."""
        calibration = recipe.calibration
        shared = {
            "version": CURVE_VERSION,
            "source": source.sha256(),
            "identity": asdict(identity),
            "calibration": calibration.model_dump(exclude={"file"}),
            "seed": recipe.seed,
            "budget": recipe.budget.model_dump(include={"sensitivity", "iterations"}),
            "weighted": recipe.weights_fits,
        }
        if text is not None:
            shared["text"] = text
            shared["tokenizer"] = tokenizer_hash(source.directory)
        response = (RESPONSE,) if measures_response(identity, recipe) else ()
        return cls((LOW_RANK, TERMS, *response), recipe.budget.structures, shared)

    def files(self, layer: LayerPlan) -> dict[str, Path]:
        """Files of a layer by part."""
        decides = json.dumps({**self.shared, "layer": layer.target.name, "bias": layer.spec.bias}, sort_keys=True)
        digests = {part: hashlib.sha256(f"{decides}:{part}".encode()).hexdigest() for part in self.parts}
        return {part: cache_directory("curves") / f"{digest[:32]}.json" for part, digest in digests.items()}


def measures_response(identity: CacheIdentity, recipe: Recipe) -> bool:
    """Whether losses are scaled by what a model with one replaced layer loses; see ``spmconvert.budget.response``."""
    if recipe.budget.sensitivity != "gradient":
        return recipe.budget.sensitivity == "kl"
    return objective_of(identity.architecture) != "hidden"


def read_part(file: Path, part: str) -> Any:
    """What was kept of a part, or None where it has to be measured: there is no file, or it is damaged."""
    try:
        return _FORMS[part].dump_python(_FORMS[part].validate_python(parse_json(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        # pydantic's refusals are ValueErrors
        return None


def write_part(file: Path, content: Any) -> None:
    """Keep what was measured; appears by one rename."""
    keep(file, json.dumps(content))
