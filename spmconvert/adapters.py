"""LoRA beside SPM layers: how PEFT knows them.

PEFT chooses the class of an adapter by the class of the layer that is named, and refuses layers that it does not know. It
has no place where packages announce theirs; one ``LoraConfig`` can be told (``_register_custom_module``), and one that is
read from a saved adapter is made by PEFT itself. So importing spmconvert has every ``LoraConfig`` told at the moment PEFT
builds a layer for it: as soon as PEFT is imported, and never otherwise. The factors of a low-rank term are ordinary
``nn.Linear`` and need none of this.

Merging folds an adapter into the layer's low-rank term (``operator/folding``), exactly and in both directions, and logs
what that does to its rank. Saving the model then writes the layer map anew (``hf``).

What it gives up: starts that take the adapter out of the dense weight (PiSSA, OLoRA, CorDA, LoftQ, ...) and forms that are
no sum of a matrix and a product (DoRA, ...) are refused by name, since no layer here has a dense weight to work on.
Experts, which are stacked, take no adapters: PEFT refuses the layer, and the layer what PEFT puts into it.
"""

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from packaging.version import Version
from peft import LoraConfig, __version__
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from spmconvert.errors import FitError, OptionError, UnsupportedLayerError
from spmconvert.operator.folding import folded, rank_of, unfolded
from spmconvert.operator.linear import SPMLinear

# the first whose layers are given the config as a whole
OLDEST = "0.21"
STARTS = (True, False, "gaussian", "orthogonal", "eva")
LOG = logging.getLogger("spmconvert.adapters")


class SPMLoraLinear(Linear):  # type: ignore[misc]
    """An SPM layer with LoRA adapters beside it.

    Attributes:
        name: of the layer in the model, for messages.
        own_rank: of its low-rank term while nothing is merged; set by the first merge.

    Shape:
        input [..., in_features] -> output [..., out_features], in the dtype of the layer's output

    Raises:
        OptionError: when the config asks for something else than a plain product beside the layer.
    """

    base_layer: SPMLinear
    name: str
    own_rank: int

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, SPMLinear)
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **known: Any) -> None:
        """Add an adapter."""
        self.name = str(known.get("target_name") or "an SPM layer")
        _check(config, self.name)
        # a delta is [out_features, in_features] here, whatever the dense layer stored
        self.fan_in_fan_out = False
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **known)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the low-rank term, and log its rank before and after.

        Args:
            safe_merge: refuse factors that are not finite.
            adapter_names: which; None for those that are active.

        Raises:
            UnsupportedLayerError: when the layer cannot take one.
            FitError: when a factor is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            factors = (self.lora_B[adapter].weight.detach(), self.lora_A[adapter].weight.detach())
            left, right = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors)
            left = left * self.scaling[adapter]
            if safe_merge and not (left.isfinite().all() and right.isfinite().all()):
                raise FitError(f"adapter {adapter} of {self.name} has values that are not finite; train it again")
            before = self.base_layer
            try:
                self.base_layer = folded(before, left, right)
            except UnsupportedLayerError as error:
                raise UnsupportedLayerError(f"adapter {adapter} cannot be merged into {self.name}: {error}") from None
            self.own_rank = self.own_rank if self.merged else rank_of(before)
            self.merged_adapters.append(adapter)
            LOG.warning("%s: adapter %s merged, %s", self.name, adapter, _growth(before, self.base_layer))

    def unmerge(self) -> None:
        """Take all merged adapters out again, to the same bits."""
        if self.merged:
            self.base_layer = unfolded(self.base_layer, self.own_rank)
            self.merged_adapters.clear()


def _check(config: LoraConfig, name: str) -> None:
    """Refuse what needs a dense weight."""
    variants = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    asked = [key for key in (*variants, "use_qalora", "lora_bias") if getattr(config, key)]
    if config.init_lora_weights not in STARTS:
        asked.append(f"init_lora_weights={config.init_lora_weights!r}")
    if asked:
        raise OptionError(
            f"{', '.join(asked)} of LoraConfig is not supported beside {name}, an SPM layer, which has no dense weight; "
            f"leave it out, or name layers that were not converted in target_modules"
        )


def _growth(before: SPMLinear, after: SPMLinear) -> str:
    ranks = [rank_of(before), rank_of(after)]
    dense = after.in_features * after.out_features
    kept = [layer.design.parameter_count(bias=False) / dense for layer in (before, after)]
    return f"low rank {ranks[0]} -> {ranks[1]} (+{ranks[1] - ranks[0]}), {kept[0]:.1%} -> {kept[1]:.1%} of the dense layer"


def _register() -> None:
    """Have PEFT know the layer, whatever config names it."""
    if Version(__version__) < Version(OLDEST):
        LOG.warning("peft %s has no adapters for SPM layers; from %s on it has: pip install -U peft", __version__, OLDEST)
        return
    create: Callable[..., nn.Module] = LoraModel._create_new_module

    def create_knowing(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **known: Any) -> nn.Module:
        lora_config._register_custom_module({SPMLinear: SPMLoraLinear})
        return create(lora_config, adapter_name, target, **known)

    LoraModel._create_new_module = staticmethod(create_knowing)


_register()
