"""What a linear layer is for, found from the module tree and its shapes instead of a table of model names.

- A block is an element of a ModuleList; the outermost list on the way to a layer is its stack, the index its block number.
- Attention: a module between block and layer is called attention by its class, or has query, key and value children.
- Feed-forward: every other layer of the block that has a counterpart there, hidden -> inner against inner -> hidden. A
  fused gate (hidden -> 2 inner) counts where its parent holds nothing but linear layers, which tells it from the
  projections of a state-space mixer.

What it gives up: an architecture that hides its blocks in something other than a ModuleList has no presets; its layers
can still be named one by one.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["linear", "conv1d"]
Role = Literal["attn", "mlp", "other"]

# subclasses of nn.Linear that only spell the same product differently
PLAIN_SUBCLASSES = ("FalconLinear",)
_QUERY_KEY_VALUE = ({"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"q", "k", "v"}, {"q_lin", "k_lin", "v_lin"})
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Linear:
    """A linear layer and where it stands.

    Attributes:
        name: module name.
        kind: ``linear`` or transformers' ``conv1d``.
        in_features: size of the input.
        out_features: size of the output.
        bias: whether it has a bias.
        stack: name of the outermost ModuleList around it, or None outside of any.
        index: block number in that stack, or None.
        role: what it is for.
    """

    name: str
    kind: Kind
    in_features: int
    out_features: int
    bias: bool
    stack: str | None
    index: int | None
    role: Role


def linear_kind(module: nn.Module) -> Kind | None:
    """Whether a module computes x Wᵀ + b and nothing else, and how it stores W."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear or type(module).__name__ in PLAIN_SUBCLASSES:
        return "linear"
    return "conv1d" if type(module) is Conv1D else None


def find_linears(model: nn.Module) -> list[Linear]:
    """All plain linear layers of a model, each once, in module order."""
    modules = dict(model.named_modules())
    raw = []
    for name, module in modules.items():
        kind = linear_kind(module)
        if kind is None:
            continue
        first, second = module.weight.shape
        shape = (second, first) if kind == "linear" else (first, second)
        raw.append((name, kind, *shape, module.bias is not None, *_stack_of(name, modules)))
    by_block: dict[tuple[str | None, int | None], list[tuple[str, int, int]]] = {}
    for name, _, fan_in, fan_out, _, stack, index in raw:
        if not _in_attention(name, stack, modules):
            by_block.setdefault((stack, index), []).append((name, fan_in, fan_out))
    return [Linear(*entry, _role(entry[0], entry[2:4], entry[5:7], modules, by_block)) for entry in raw]


def _stack_of(name: str, modules: dict[str, nn.Module]) -> tuple[str | None, int | None]:
    parts = name.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        if isinstance(modules[prefix], nn.ModuleList):
            return prefix, int(parts[end])
    return None, None


def _ancestors(name: str, stack: str | None) -> Iterator[str]:
    """Names of the modules between the block and the layer, both left out."""
    if stack is None:
        return
    parts = name.split(".")
    for end in range(stack.count(".") + 3, len(parts)):
        yield ".".join(parts[:end])


def _in_attention(name: str, stack: str | None, modules: dict[str, nn.Module]) -> bool:
    for ancestor in _ancestors(name, stack):
        module = modules[ancestor]
        children = {child for child, _ in module.named_children()}
        if "attention" in type(module).__name__.lower() or any(names <= children for names in _QUERY_KEY_VALUE):
            return True
    return False


def _role(
    name: str,
    shape: tuple[int, int],
    place: tuple[str | None, int | None],
    modules: dict[str, nn.Module],
    by_block: dict[tuple[str | None, int | None], list[tuple[str, int, int]]],
) -> Role:
    if place[0] is None:
        return "other"
    if _in_attention(name, place[0], modules):
        return "attn"
    fan_in, fan_out = shape
    parent = modules[name.rpartition(".")[0]]
    for other, other_in, other_out in by_block[place]:
        if other != name and (other_in, other_out) == (fan_out, fan_in):
            return "mlp"
        fused = {(other_in * 2, other_out), (other_in, other_out * 2)} & {(fan_out, fan_in)}
        doubled = (fan_out == 2 * other_in and fan_in == other_out) or (other_out == 2 * fan_in and fan_out == other_in)
        if (fused or doubled) and other.rpartition(".")[0] == name.rpartition(".")[0] and _only_linears(parent):
            return "mlp"
    return "other"


def _only_linears(parent: nn.Module) -> bool:
    own = any(True for _ in parent.parameters(recurse=False))
    return not own and all(linear_kind(child) or not list(child.parameters()) for child in parent.children())


def tied_to(model: nn.Module) -> dict[str, str]:
    """For every module whose parameter is shared with another module, the name of that other module."""
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0]
        first = owners.setdefault(id(parameter), module)
        if first != module:
            tied.setdefault(module, first)
            tied.setdefault(first, module)
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in declared.items():
        if target.endswith(".weight"):
            tied.setdefault(target.removesuffix(".weight"), source.removesuffix(".weight"))
            tied.setdefault(source.removesuffix(".weight"), target.removesuffix(".weight"))
    return tied


def output_head(model: nn.Module) -> str | None:
    """Name of the output embeddings, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def reads_weight_directly(model: nn.Module, name: str) -> bool:
    """Whether the parent's code uses the layer's weight itself, as Mamba does, so that a replacement would be passed by.

    Asking a weight for its dtype or device, or whether it is a tensor, does not count.
    """
    parent, _, child = name.rpartition(".")
    pattern = re.compile(rf"(?<!isinstance\()self\.{re.escape(child)}\.weight(?!\.dtype|\.device|\w)")
    for cls in type(model.get_submodule(parent)).__mro__:
        if cls is nn.Module:
            break
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):
            # no source at hand, for classes made at run time
            continue
        if pattern.search(source):
            return True
    return False


def is_router(model: nn.Module, linear: Linear) -> bool:
    """Whether a layer chooses experts: one output an expert, or a single gate."""
    config = getattr(model, "config", None)
    counts = {getattr(config, name, None) for name in _EXPERT_COUNTS} - {None}
    return (
        linear.role == "other" and linear.index is not None and (linear.out_features == 1 or linear.out_features in counts)
    )


def fused_experts(model: nn.Module) -> list[str]:
    """Names of expert weights that are one three-dimensional parameter for all experts."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "expert" in name.lower() and not isinstance(_owner(model, name), nn.modules.conv._ConvNd)
    ]


def _owner(model: nn.Module, parameter_name: str) -> nn.Module:
    return model.get_submodule(parameter_name.rpartition(".")[0])
