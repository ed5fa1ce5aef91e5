"""What spm.json has to say for the commands that come after a conversion, checked when a converted checkpoint is opened.

The file may be edited, cut short or come from somebody else, and every later command reads some of it. It is checked once,
here, so that none of them meets a missing key in the middle of its work. What more it holds is left as it is.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spmconvert.checkpoint.manifest import PROVENANCE_FILE
from spmconvert.errors import CorruptCheckpointError
from spmconvert.system.validation import finding


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Source(_Part):
    name: str
    revision: str | None
    sha256: str


class _RecipeCalibration(_Part):
    file: str | None


class _Recipe(_Part):
    calibration: _RecipeCalibration
    fit: dict[str, Any]


class _Calibration(_Part):
    file_sha256: str
    fitted_rows: int
    choosing_rows: int
    held_out_rows: int


class _Amounts(_Part):
    before: Annotated[int, Field(ge=1)]
    after: Annotated[int, Field(ge=1)]


class _Layer(_Part):
    name: str
    dense_parameters: Annotated[int, Field(ge=1)]
    parameters: Annotated[int, Field(ge=0)]
    error: float
    baseline_error: float
    baseline_rank: int


class _FinetuneRecipe(_Part):
    train: str


class _Finetune(_Part):
    recipe: _FinetuneRecipe
    data_sha256: str


class _Provenance(_Part):
    spmconvert_version: str
    source: _Source
    recipe: _Recipe
    calibration: _Calibration | None
    parameters: _Amounts
    bytes: _Amounts
    layers: list[_Layer]
    finetune: list[_Finetune] = []


def check_provenance(directory: Path, provenance: dict[str, Any], layers: set[str]) -> None:
    """Refuse what later commands could not read.

    Args:
        directory: the checkpoint.
        provenance: content of its spm.json.
        layers: names of its layer map.

    Raises:
        CorruptCheckpointError: when a key is missing or has another type, or the layers are not those of the layer map.
    """
    file = directory / PROVENANCE_FILE
    try:
        checked = _Provenance.model_validate(provenance)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptCheckpointError(
            f"{file} does not say what it should at {where!r} ({finding(first)}); download it or convert again"
        ) from None
    recorded = {layer.name for layer in checked.layers}
    if recorded != layers:
        odd = sorted(recorded ^ layers)[0]
        raise CorruptCheckpointError(
            f"{file} and the layer map of config.json do not name the same layers, for example {odd}; download it or "
            "convert again"
        )
