"""What a linear layer is for, found from the module tree and its shapes instead of a table of model names.

- A block is an element of a ModuleList that holds layers; the outermost such list on the way to a layer is its stack, the
  index its block number. A list of bare layers, of output heads for example, is no stack.
- Attention: a module between block and layer is called attention by its class, or has query, key and value children; the
  block itself is attention where it holds query, key and value and nothing but linear layers.
- Feed-forward: every other layer of the block that has a counterpart there, hidden -> inner against inner -> hidden. The
  first of the two has to widen. Where it narrows, as in experts, the parent must hold nothing but linear layers; where
  both are square, it must be the block or hold nothing but linear layers and norms, which tells them from a recurrent
  mixer. A fused gate (hidden -> 2 inner) counts where its parent holds nothing but linear layers, which tells it from
  the projections of a state-space mixer.
- Experts that were opened (``model.experts``) are feed-forward outside of an attention, and one group a projection. Those
  that are modules in a list called ``experts`` are one group, too, where they are of one shape.

What it gives up: an architecture that hides its blocks in something other than a ModuleList has no presets; its layers
can still be named one by one. The bottlenecks around MobileBERT's blocks have the shapes of a feed-forward and count as it.
"""

import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from spmconvert.model.experts import chosen_experts
from spmconvert.model.opened_module import OpenedModule
from spmconvert.model.opening import group_of, place_in_list

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
        group: of an expert's layer: the experts and the projection, which have one design; empty for any other.
        share: of the tokens, that it sees.
        stepwise: whether it is called for every token by itself, as what multiplies the states of a recurrence is.
        stacked: whether it is stored and held stacked with the others of its group.
    """

    name: str
    kind: Kind
    in_features: int
    out_features: int
    bias: bool
    stack: str | None
    index: int | None
    role: Role
    group: str = ""
    share: float = 1.0
    stepwise: bool = False
    stacked: bool = False


def linear_kind(module: nn.Module) -> Kind | None:
    """Whether a module computes x Wᵀ + b and nothing else, and how it stores W."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).__name__ in PLAIN_SUBCLASSES):
        return "linear"
    return "conv1d" if type(module) is Conv1D else None


def find_linears(model: nn.Module) -> list[Linear]:
    """All plain linear layers of a model, each once, in module order."""
    modules = dict(model.named_modules())
    placed: list[Linear] = []
    for name, module in modules.items():
        kind = linear_kind(module)
        if kind is None:
            continue
        first, second = module.weight.shape
        fan_in, fan_out = (second, first) if kind == "linear" else (first, second)
        stack, index = stack_of(name, modules)
        bias, opened = module.bias is not None, _opened(name, modules)
        in_attention = _in_attention(name, stack, modules)
        if opened is not None and modules[opened].alike:
            group, share = f"{opened}.{name.rpartition('.')[2]}", modules[opened].share
            role: Role = "attn" if in_attention else "mlp"
            stacked = modules[opened].stacks
            placed.append(Linear(name, kind, fan_in, fan_out, bias, stack, index, role, group, share, stacked=stacked))
            continue
        role = "attn" if in_attention else "other"
        stepwise = opened is not None and modules[opened].is_stepwise(name.rpartition(".")[2])
        placed.append(Linear(name, kind, fan_in, fan_out, bias, stack, index, role, stepwise=stepwise))
    placed = _with_groups(model, placed, modules)
    peers: dict[tuple[str | None, int | None], list[Linear]] = {}
    for linear in placed:
        if linear.role == "other":
            peers.setdefault((linear.stack, linear.index), []).append(linear)
    return [
        replace(linear, role="mlp")
        if linear.role == "other" and _is_feed_forward(linear, peers[linear.stack, linear.index], modules)
        else linear
        for linear in placed
    ]


def _with_groups(model: nn.Module, placed: list[Linear], modules: dict[str, nn.Module]) -> list[Linear]:
    """The layers with those of experts that are modules in a list put in groups, where all of a group are of one shape."""
    members: dict[tuple[str, str], list[Linear]] = {}
    for linear in placed:
        if not linear.group and (place := place_in_list(linear.name)) is not None:
            members.setdefault(place, []).append(linear)
    grouped: dict[str, Linear] = {}
    for (experts, _), own in members.items():
        if len(own) > 1 and len({(linear.in_features, linear.out_features, linear.bias) for linear in own}) == 1:
            around = modules[_parent_of(experts)]
            share = min(1.0, (chosen_experts(around, getattr(model, "config", None)) or len(own)) / len(own))
            grouped |= {linear.name: replace(linear, group=group_of(linear.name) or "", share=share) for linear in own}
    return [grouped.get(linear.name, linear) for linear in placed]


def _opened(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Name of the opened module that a layer belongs to."""
    found = _parent_of(_parent_of(name))
    return found if isinstance(modules.get(found), OpenedModule) else None


def stack_of(name: str, modules: dict[str, nn.Module]) -> tuple[str | None, int | None]:
    """The outermost ModuleList of blocks around a module and the block's number, or None twice."""
    parts = name.split(".")
    # the last part is the module itself: an element of a list is a block only where it holds the module
    for end in range(1, len(parts) - 1):
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
        if "attention" in type(module).__name__.lower() or _has_query_key_value(module):
            return True
    parent = modules[_parent_of(name)]
    return stack is not None and _has_query_key_value(parent) and _holds_only_linears(parent)


def _has_query_key_value(module: nn.Module) -> bool:
    children = {child for child, _ in module.named_children()}
    return any(names <= children for names in _QUERY_KEY_VALUE)


def _is_feed_forward(layer: Linear, peers: Sequence[Linear], modules: dict[str, nn.Module]) -> bool:
    """Whether one of the other layers of the block is the layer's counterpart."""
    if layer.stack is None:
        return False
    parent = modules[_parent_of(layer.name)]
    plain = _holds_only_linears(parent)
    in_block = _parent_of(layer.name) == f"{layer.stack}.{layer.index}"
    layer_position = peers.index(layer)
    for other_position, other in enumerate(peers):
        if other_position == layer_position:
            continue
        first, second = (layer, other) if layer_position < other_position else (other, layer)
        if (first.in_features, first.out_features) == (second.out_features, second.in_features):
            square = first.in_features == first.out_features
            if plain or first.in_features < first.out_features:
                return True
            if square and (in_block or _holds_only_linears(parent, norms=True)):
                return True
        fused = _is_fused_gate(first, second) or _is_fused_gate(second, first)
        if fused and plain and _parent_of(first.name) == _parent_of(second.name):
            return True
    return False


def _is_fused_gate(up: Linear, down: Linear) -> bool:
    return up.in_features == down.out_features and up.out_features == 2 * down.in_features


def _holds_only_linears(parent: nn.Module, *, norms: bool = False) -> bool:
    """Whether all parameters below a module are those of its linear layers, and of norms where these are allowed."""
    largest = 1 if norms else 0
    holds_parameters = any(True for _ in parent.parameters(recurse=False))
    return not holds_parameters and all(
        linear_kind(child) or all(parameter.ndim <= largest for parameter in child.parameters())
        for child in parent.children()
    )


def _parent_of(name: str) -> str:
    return name.rpartition(".")[0]


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
        if pattern.search(_source_of(cls)):
            return True
    return False


@functools.cache
def _source_of(cls: type) -> str:
    """Source text of a class; read once, because finding it parses the whole file. Empty for classes made at run time."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def is_router(model: nn.Module, linear: Linear) -> bool:
    """Whether a layer of a block chooses paths: it is called router, or has one output an expert, or a single gate."""
    if linear.role != "other" or linear.index is None:
        return False
    config = getattr(model, "config", None)
    counts = {getattr(config, name, None) for name in _EXPERT_COUNTS} - {None}
    return "router" in linear.name or linear.out_features == 1 or linear.out_features in counts


def fused_experts(model: nn.Module) -> dict[str, str]:
    """Expert weights that are one parameter for all experts and were not opened, by name, and how they are fused."""
    found = {}
    for name, parameter in model.named_parameters():
        if "expert" not in name.lower() or isinstance(_owner(model, name), nn.modules.conv._ConvNd):
            continue
        if parameter.ndim == 3:
            found[name] = "fused three-dimensional expert parameter, not convertible"
        elif parameter.ndim == 2 and not name.endswith(("weight", "bias")):
            # DBRX
            found[name] = "matrices of all experts one below the other in one parameter, not convertible"
    return found


def unsupported_forms(model: nn.Module) -> dict[str, str]:
    """Class names of the modules in blocks that hold a matrix but are no plain linear layer, such as routers."""
    modules = dict(model.named_modules())
    forms = {}
    for name, module in modules.items():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.ndim != 2 or linear_kind(module) or isinstance(module, nn.Embedding):
            continue
        if stack_of(name, modules)[0] is not None:
            forms[name] = type(module).__name__
    return forms


def _owner(model: nn.Module, parameter_name: str) -> nn.Module:
    return model.get_submodule(parameter_name.rpartition(".")[0])
