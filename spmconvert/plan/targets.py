"""Which layers of a model are replaced: presets, patterns, block ranges, and what is left alone with the reason why.

Presets take layers of the repeated blocks only: ``mlp`` the feed-forward layers, ``attn`` the attention projections,
``all`` every linear layer there. Output heads, anything tied, routers and layers whose weight the model's code reads itself
are never part of a preset. A pattern may name any plain linear layer that is not tied. ``text:``, ``vision:`` and
``audio:`` before either confine it to a tower. What matches nothing is an error.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from spmconvert.errors import OptionError, TargetError, UnsupportedLayerError
from spmconvert.model.towers import TOWERS, Tower, inside, towers_of
from spmconvert.plan.structure import (
    Kind,
    Linear,
    find_linears,
    fused_experts,
    is_router,
    output_head,
    reads_weight_directly,
    tied_to,
    unsupported_forms,
)

PRESETS = ("mlp", "attn", "all")
_WILDCARDS = re.compile(r"[*?\[]")
_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")


@dataclass(frozen=True)
class Target:
    """A dense layer that will be replaced.

    Attributes:
        name: module name.
        kind: how it stores its weight.
        in_features: size of the input.
        out_features: size of the output.
        bias: whether it has a bias.
        group: of an expert's layer: the experts and the projection, which have one design; empty for any other.
        share: of the tokens, that it sees.
        stepwise: whether it is called for every token by itself.
        stacked: whether it is stored and held stacked with the others of its group.
    """

    name: str
    kind: Kind
    in_features: int
    out_features: int
    bias: bool
    group: str = ""
    share: float = 1.0
    stepwise: bool = False
    stacked: bool = False

    @property
    def stack(self) -> str:
        """The experts and the projection that it is stacked in; empty for any other layer."""
        return self.group if self.stacked else ""

    def flops(self, amount: int) -> int:
        """What is left of an amount for every token that the layer sees."""
        return round(self.share * amount)


@dataclass(frozen=True)
class Skipped:
    """A layer that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """Targets in module order, and the layers that were left alone."""

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]


def matches(pattern: str, name: str, prefix: str = "") -> bool:
    """Whether a glob or ``re:`` pattern matches a module name.

    A glob is compared with the whole name, with the name without the base model's prefix, and, where it has no dot, with
    the last part of the name.

    Raises:
        OptionError: when a regular expression does not compile.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise OptionError(f"pattern {pattern!r} is not a regular expression: {error}; fix it or use a glob") from None
    names = {name, name.removeprefix(f"{prefix}.")} | ({name.rpartition(".")[2]} if "." not in pattern else set())
    return any(fnmatchcase(candidate, pattern) for candidate in names)


def select_targets(
    model: nn.Module,
    *,
    targets: Sequence[str],
    ignore: Sequence[str] = (),
    layers: str | None = None,
    tower: Tower | None = None,
) -> Selection:
    """Resolve presets and patterns against a model.

    Args:
        model: module tree, on any device; only names and shapes are read.
        targets: presets, globs and ``re:`` patterns.
        ignore: presets and patterns that take layers away again.
        layers: block numbers such as ``4-10,-1``; negative ones count from the end of each stack.
        tower: what presets mean where the model has towers and they name none; None for all of them.

    Raises:
        TargetError: when a pattern or everything together matches nothing, or only layers that are tied.
        UnsupportedLayerError: when a module is named that cannot be converted.
        OptionError: when a regular expression or the block numbers are malformed.
    """
    if not targets:
        raise OptionError("no targets are given; use --targets mlp, attn, all or a pattern")
    survey = _Survey(model, tower)
    wanted = {name for pattern in targets for name in survey.resolve(pattern)}
    unwanted = {name for pattern in ignore for name in survey.resolve_ignored(pattern)}
    numbers = None if layers is None else _block_numbers(layers, survey.depths)
    left = wanted - unwanted
    chosen = [
        linear
        for linear in survey.linears
        if linear.name in left and (numbers is None or (linear.stack, linear.index) in numbers)
    ]
    if not chosen:
        narrowed = " ".join(
            text for text in (f"--ignore {','.join(ignore)}" * bool(ignore), f"--layers {layers}" * bool(layers)) if text
        )
        raise TargetError(f"--targets {','.join(targets)} {narrowed} leaves no layer to convert; widen the selection")
    _check_experts(survey.linears, chosen)
    selected = tuple(
        Target(c.name, c.kind, c.in_features, c.out_features, c.bias, c.group, c.share, c.stepwise, c.stacked)
        for c in chosen
    )
    names = {target.name for target in selected}
    skipped = tuple(Skipped(name, reason) for name, reason in survey.reasons.items() if name not in names)
    return Selection(selected, skipped)


def _check_experts(linears: Sequence[Linear], chosen: Sequence[Linear]) -> None:
    """Refuse a part of the experts of a layer.

    Raises:
        TargetError: when some of a group are chosen and others are not.
    """
    names = {linear.name for linear in chosen}
    groups = {linear.group for linear in chosen} - {""}
    left = next((linear for linear in linears if linear.group in groups and linear.name not in names), None)
    if left is not None:
        experts, _, projection = left.group.rpartition(".")
        raise TargetError(
            f"{left.name} is left out, and other experts beside it are not; all have one design, so take or leave "
            f"{experts}.*.{projection} as a whole"
        )


class _Survey:
    """Everything that is known about a model's linear layers before any pattern is looked at."""

    def __init__(self, model: nn.Module, tower: Tower | None = None) -> None:
        self.model = model
        self.towers = towers_of(model)
        self.tower = self.towers.get(tower) if tower is not None else None
        self.prefix = getattr(model, "base_model_prefix", "")
        self.linears = find_linears(model)
        self.names = [linear.name for linear in self.linears]
        stacks = dict.fromkeys(linear.stack for linear in self.linears if linear.stack is not None)
        self.depths = {stack: len(list(model.get_submodule(stack).children())) for stack in stacks}
        self.tied = tied_to(model)
        self.experts = fused_experts(model)
        self.apart = self._in_other_towers()
        self.reasons = {**self.apart, **self._left_alone()}

    def _in_other_towers(self) -> dict[str, str]:
        """Layers of towers that the calibration does not run, with the reason."""
        return {
            name: f"in the {other} tower, which the calibration does not run; {other}:mlp would take it"
            for other, place in self.towers.items()
            for name in self.names
            if self.tower is not None and place != self.tower and inside(place, name)
        }

    def _left_alone(self) -> dict[str, str]:
        """Layers that no preset takes, with the reason."""
        head = output_head(self.model)
        reasons = {}
        for linear in self.linears:
            if linear.name in self.tied:
                reasons[linear.name] = f"shares its weight with {self.tied[linear.name]}"
            elif linear.name == head:
                reasons[linear.name] = "output head"
            elif linear.stack is None:
                reasons[linear.name] = "outside of the repeated blocks"
            elif is_router(self.model, linear):
                reasons[linear.name] = "router"
            elif reads_weight_directly(self.model, linear.name):
                reasons[linear.name] = "the model's code reads its weight itself"
        for name, kind in unsupported_forms(self.model).items():
            reasons[name] = f"of type {kind}, not a plain linear layer"
        return {**reasons, **self.experts}

    def resolve(self, pattern: str) -> list[str]:
        """Names that a preset or pattern selects."""
        place, pattern = self._in_tower(pattern)
        if pattern in PRESETS:
            return self._preset(pattern, place)
        matching = [name for name in self.names if _is_in(place, name) and matches(pattern, name, self.prefix)]
        if not matching:
            self._explain_nothing(pattern)
        free = [name for name in matching if name not in self.tied and not self._read_directly(name)]
        if not free:
            name = matching[0]
            if name in self.tied:
                raise TargetError(
                    f"{name} shares its weight with {self.tied[name]}, so replacing it would untie them; leave it out, "
                    "or untie the model first"
                )
            raise UnsupportedLayerError(
                f"{name} cannot be replaced, the model's code reads its weight itself; leave it out"
            )
        return free

    def resolve_ignored(self, pattern: str) -> list[str]:
        """Names that an ignore pattern takes away."""
        place, pattern = self._in_tower(pattern)
        if pattern in PRESETS:
            return self._preset(pattern, place)
        known = [name for name in [*self.names, *self.experts] if _is_in(place, name)]
        matching = [name for name in known if matches(pattern, name, self.prefix)]
        if not matching:
            raise TargetError(f"--ignore {pattern} matches no linear layer; {self._near(pattern)}")
        return matching

    def _in_tower(self, pattern: str) -> tuple[str | None, str]:
        """The tower that a pattern is confined to, and the rest of it.

        Raises:
            TargetError: when the model has no such tower.
        """
        kind, colon, rest = pattern.partition(":")
        if not colon or kind not in TOWERS:
            return None, pattern
        place = next((place for tower, place in self.towers.items() if tower == kind), None)
        if place is None:
            has = f"towers for {', '.join(self.towers)}" if self.towers else "no towers"
            article = "an" if kind == "audio" else "a"
            raise TargetError(
                f"{pattern} names {article} {kind} tower, and {type(self.model).__name__} has {has}; write {rest}"
            )
        return place, rest

    def _preset(self, preset: str, place: str | None) -> list[str]:
        roles = ("attn", "mlp", "other") if preset == "all" else (preset,)
        # a tower that is named is taken, whether the calibration runs it or not
        kept_out = {name for name, reason in self.reasons.items() if place is None or reason != self.apart.get(name)}
        names = [
            linear.name
            for linear in self.linears
            if linear.role in roles and linear.name not in kept_out and _is_in(place, linear.name)
        ]
        if not names:
            hint = f"; its experts are fused parameters, {next(iter(self.experts))} for example" if self.experts else ""
            raise TargetError(
                f"preset {preset} finds no layer in {type(self.model).__name__}{hint}; name layers by pattern, "
                f"{self._near(preset)}"
            )
        return names

    def _read_directly(self, name: str) -> bool:
        return self.reasons.get(name, "").startswith("the model's code")

    def _explain_nothing(self, pattern: str) -> None:
        fused = [name for name in self.experts if matches(pattern, name, self.prefix)]
        modules = [name for name, _ in self.model.named_modules() if name]
        named = [name for name in modules if matches(pattern, name, self.prefix)]
        leaves = [name for name in named if not list(self.model.get_submodule(name).children())]
        if not fused and named:
            fused = [name for name in self.experts if any(name.startswith(f"{owner}.") for owner in named)]
        if fused:
            raise UnsupportedLayerError(f"{fused[0]}: {self.experts[fused[0]]}; choose other layers")
        if leaves and not _WILDCARDS.search(pattern) and not pattern.startswith("re:"):
            kind = type(self.model.get_submodule(leaves[0])).__name__
            raise UnsupportedLayerError(
                f"{leaves[0]} is of type {kind}; only plain linear layers (nn.Linear, Conv1D) can be converted"
            )
        raise TargetError(f"pattern {pattern!r} matches no linear layer; {self._near(pattern)}")

    def _near(self, pattern: str) -> str:
        plain = pattern.removeprefix("re:").replace("*", "")
        near = difflib.get_close_matches(plain, self.names, n=3, cutoff=0.5)
        last_parts = {name.rpartition(".")[2]: name for name in self.names}
        near += [
            last_parts[part] for part in difflib.get_close_matches(plain.rpartition(".")[2], last_parts, n=3, cutoff=0.6)
        ]
        examples = list(dict.fromkeys(near)) or self.names[:3]
        return f"near names are {', '.join(examples)}" if near else f"there are {', '.join(examples) or 'none'}"


def _is_in(place: str | None, name: str) -> bool:
    return place is None or inside(place, name)


def _block_numbers(text: str, depth: dict[str, int]) -> set[tuple[str | None, int | None]]:
    """Stack and index of every block that ``4-10,-1`` names, in every stack that is deep enough."""
    if not depth:
        raise OptionError(f"--layers {text} is given, but the model has no numbered blocks; leave it out")
    chosen: set[tuple[str | None, int | None]] = set()
    for part in text.split(","):
        bounds = _RANGE.fullmatch(part.strip())
        if bounds is None:
            raise OptionError(f"--layers {text!r} is not understood at {part!r}; write for example 4-10,-1")
        same_end = bounds[2] is not None and bounds[1].startswith("-") == bounds[2].startswith("-")
        if same_end and int(bounds[1]) > int(bounds[2]):
            raise OptionError(f"--layers {part.strip()} runs backwards; write {bounds[2]}-{bounds[1]}")
        hit = False
        for stack, size in depth.items():
            first, last = (int(n) + (size if n.startswith("-") else 0) for n in (bounds[1], bounds[2] or bounds[1]))
            if 0 <= first <= last < size:
                chosen |= {(stack, index) for index in range(first, last + 1)}
                hit = True
        if not hit:
            raise OptionError(
                f"--layers {part} is outside of the model's blocks; they are numbered 0 to {max(depth.values()) - 1}"
            )
    return chosen
