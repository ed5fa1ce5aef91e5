"""Which parameters of a converted model a finetune trains."""

import math

from torch import nn

from spmconvert.checkpoint.converted import Converted
from spmconvert.checkpoint.headers import SAFETENSORS_DTYPES
from spmconvert.model.stacked_experts import is_converted
from spmconvert.model.stored import stored_prefixes
from spmconvert.operator.linear import SPMLinear
from spmconvert.recipe.recipe import Training


def choose_trained(student: nn.Module, training: Training) -> dict[str, nn.Parameter]:
    """Freeze everything but what is trained; returns the trained parameters by name."""
    inside = structured_parameters(student)
    chosen = {}
    for name, parameter in student.named_parameters():
        small = training.train == "norms" and parameter.ndim == 1
        wanted = training.train == "all" or name in inside or small
        parameter.requires_grad_(wanted)
        if wanted:
            chosen[name] = parameter
    return chosen


def converted_layers(student: nn.Module) -> tuple[str, ...]:
    """Names of the SPM layers of a model, in its order; without those of experts, which see other tokens in each."""
    return tuple(name for name, module in student.named_modules() if isinstance(module, SPMLinear))


def structured_parameters(student: nn.Module) -> set[str]:
    """Names of all parameters of SPM layers, stacked ones too."""
    return {
        f"{name}.{part}"
        for name, module in student.named_modules()
        if is_converted(module)
        for part, _ in module.named_parameters()
    }


def state_bytes(converted: Converted, training: Training) -> int:
    """Bytes of a training state on disk, from the headers: trained parameters, best ones, two moments, and an average."""
    prefixes = tuple(f"{prefix}." for prefix in stored_prefixes(converted).values())
    # beside its parameters a layer stores its mark and indices
    marks = {f"{prefix}weight" for prefix in prefixes}
    trained = sum(
        math.prod(entry.shape)
        for name, entry in converted.tensors.items()
        if (training.train == "all" or name.startswith(prefixes) or (training.train == "norms" and len(entry.shape) == 1))
        and not (name in marks or (name.startswith(prefixes) and entry.dtype not in SAFETENSORS_DTYPES))
    )
    return 4 * trained * (5 if training.ema else 4)
