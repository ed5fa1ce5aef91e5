"""Which layers of a checkpoint one linear layer of vLLM stands for.

vLLM computes q, k and v, and gate and up, as one layer with several output partitions. In a checkpoint they are layers of
their own, each with its own design or dense. A model says by ``packed_modules_mapping`` what its fused layers are made of,
in the order of the partitions. A few checkpoints have them fused already (Phi-3): there one layer of the map stands for all
partitions.

This module imports neither torch nor vLLM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.checkpoint.names import resolve_name
from spmconvert.errors import CheckpointError, UnsupportedLayerError

# what vLLM calls the base model of most architectures
BASE_PREFIX = "model"
# fused in checkpoints, too, with the outputs in the order of the partitions; others are interleaved and sorted by vLLM
FUSED_IN_ORDER = ("qkv_proj", "gate_up_proj")
# what vLLM 0.32 and 0.33 call BERT's fused attention, whose output layer stands beside it, and what it is
MISNAMED = (".attention.output.qkv_proj", ".attention.self.qkv_proj")
# what vLLM calls the partitions of a fused attention layer; others are numbers
ATTENTION_SHARDS = ("q", "k", "v")


@dataclass(frozen=True)
class Partition:
    """A layer of the checkpoint inside of a layer of vLLM.

    Attributes:
        name: of the layer, as vLLM would call it if it were alone.
        out_features: number of its outputs.
        spec: what it is; None where it is dense.
    """

    name: str
    out_features: int
    spec: LayerSpec | None

    @property
    def design(self) -> str:
        """What it is, in words."""
        return "dense" if self.spec is None else self.spec.design.describe()


def constituents(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the layers that one of vLLM's would stand for.

    Args:
        prefix: name of vLLM's layer.
        packed: ``packed_modules_mapping``.
    """
    parent, _, leaf = prefix.replace(*MISNAMED).rpartition(".")
    return [f"{parent}.{name}" if parent else name for name in packed.get(leaf, [leaf])]


def spec_of(name: str, layers: Mapping[str, LayerSpec]) -> LayerSpec | None:
    """What a layer is by the layer map, with or without the base model's prefix; None for a dense one."""
    known = resolve_name(name, layers, BASE_PREFIX)
    return None if known is None else layers[known]


def has_replaced(prefix: str, packed: Mapping[str, Sequence[str]], layers: Mapping[str, LayerSpec]) -> bool:
    """Whether a layer of vLLM stands for any layer of the map."""
    names = {prefix, *constituents(prefix, packed)}
    return any(spec_of(name, layers) is not None for name in names)


def partitions_of(
    prefix: str, sizes: Sequence[int], packed: Mapping[str, Sequence[str]], layers: Mapping[str, LayerSpec]
) -> list[Partition]:
    """The layers that one of vLLM's stands for, in the order of its outputs.

    Args:
        prefix: name of vLLM's layer.
        sizes: outputs of each of its partitions.
        packed: ``packed_modules_mapping``.
        layers: the layer map.

    Raises:
        UnsupportedLayerError: when it is not known how its outputs are laid out.
    """
    whole = spec_of(prefix, layers)
    if whole is not None:
        leaf = prefix.rpartition(".")[2]
        if len(sizes) > 1 and leaf not in FUSED_IN_ORDER:
            raise UnsupportedLayerError(
                f"layer {prefix} is fused in the checkpoint, and vLLM would sort the rows of a dense one; {REMEDY}"
            )
        return [Partition(prefix, sum(sizes), whole)]
    names = constituents(prefix, packed)
    if len(names) != len(sizes):
        raise UnsupportedLayerError(
            f"layer {prefix} has {len(sizes)} parts in vLLM and {len(names)} layers in the checkpoint; {REMEDY}"
        )
    return [Partition(name, size, spec_of(name, layers)) for name, size in zip(names, sizes, strict=True)]


def check_whole(prefix: str, given: tuple[int, int], whole: tuple[int, int]) -> None:
    """Refuse a part of a layer.

    Args:
        prefix: name of vLLM's layer.
        given: inputs and outputs on this rank.
        whole: of the layer.

    Raises:
        UnsupportedLayerError: when they differ.
    """
    if given != whole:
        raise UnsupportedLayerError(
            f"layer {prefix} is to be split by tensor parallelism, {_shape(given)} of {_shape(whole)}, which no SPM layer "
            "can be; serve with --tensor-parallel-size 1"
        )


def check_sizes(partition: Partition, in_features: int) -> None:
    """Compare a layer of the map with the place that it is to take.

    Raises:
        CheckpointError: when the sizes differ.
    """
    if partition.spec is None:
        return
    design = partition.spec.design
    mapped, place = (design.in_features, design.out_features), (in_features, partition.out_features)
    if mapped != place:
        raise CheckpointError(
            f"layer {partition.name} is {_shape(place)} in vLLM's model and {_shape(mapped)} in the layer map; "
            "config.json was changed"
        )


def position_of(shard: object, partitions: Sequence[Partition]) -> int:
    """Position of the partition that vLLM's loader means.

    Args:
        shard: None for a layer that is not fused, a number, or a letter of ``ATTENTION_SHARDS``.
        partitions: of the layer.

    Raises:
        CheckpointError: when it means none.
    """
    if len(partitions) == 1:
        return 0
    found = ATTENTION_SHARDS.index(shard) if shard in ATTENTION_SHARDS else shard
    if not isinstance(found, int) or not 0 <= found < len(partitions):
        names = ", ".join(partition.name for partition in partitions)
        raise CheckpointError(f"vLLM loads part {shard!r} of the layer that is made of {names}; {REMEDY}")
    return found


def _shape(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]} x {sizes[1]}"


REMEDY = "serve a dense export (spmconvert export --format dense)"
