"""Where the parameters of a loaded checkpoint are written again, each under the names that the checkpoint has for it.

Most have one name. One that is tied may be stored beside what it is tied to; one that several tensors are merged into while
the checkpoint is loaded, such as the fused experts of a mixture, is cut up again as transformers does it when it saves.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spmconvert.errors import CheckpointError
from spmconvert.model.stored import StoredNames


@dataclass(frozen=True)
class SavedNames:
    """Names of a model's parameters in the checkpoint that it was loaded from.

    Attributes:
        model: the loaded model.
        names: of the checkpoint.
    """

    model: Any
    names: StoredNames

    def first(self, parameter: str) -> str:
        """One tensor that a parameter is written to.

        Raises:
            CheckpointError: when there is none.
        """
        stored = self.names.tensor(parameter)
        if stored is None:
            merged = self.names.parts_of(parameter)
            if not merged:
                raise CheckpointError(
                    f"parameter {parameter} is not a tensor of the checkpoint, nor merged of some (split when the model "
                    "loads); train fewer parameters"
                )
            stored = merged[0]
        return stored

    def tensors(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """All tensors that a parameter is written to when it has a value.

        Raises:
            CheckpointError: when transformers would save it under other names than the checkpoint has.
        """
        merged = self.names.parts_of(parameter)
        if self.names.tensor(parameter) is None and merged:
            cut = self._cut(parameter, value)
            if set(cut) != set(merged):
                raise CheckpointError(
                    f"parameter {parameter} was merged of {merged[0]} and others, and would be saved as "
                    f"{min(cut)}; train fewer parameters"
                )
            return cut
        # one that is tied may be stored under several names, each a tensor of its own
        own = dict(self.model.named_parameters(remove_duplicate=False))
        alike = [name for name, other in own.items() if other is own[parameter]]
        stored = dict.fromkeys(found for name in alike if (found := self.names.tensor(name)) is not None)
        return {name: value.clone() for name in stored}

    def _cut(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        known, _ = self.names.merged(parameter)
        found: dict[str, Tensor] = revert_weight_conversion(self.model, {known: value})
        return {name: tensor.clone() for name, tensor in found.items()}
