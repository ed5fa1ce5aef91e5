"""Which parameters of a converted model a finetune trains."""

from torch import nn

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
    """Names of the SPM layers of a model, in its order."""
    return tuple(name for name, module in student.named_modules() if isinstance(module, SPMLinear))


def structured_parameters(student: nn.Module) -> set[str]:
    """Names of all parameters of SPM layers."""
    return {
        f"{name}.{part}" for name in converted_layers(student) for part, _ in student.get_submodule(name).named_parameters()
    }
