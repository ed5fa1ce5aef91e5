"""A conversion while transformers loads a dense model: fitted and swapped in memory, nothing written."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spmconvert.budget.allocation import allocate, check_reachable
from spmconvert.budget.cache import CacheIdentity
from spmconvert.budget.curves import measure_curves
from spmconvert.calibrate.moments import Moments, gather_moments
from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.checkpoint.reader import open_loaded, tokenizer_place
from spmconvert.data.calibration import CalibrationRows, calibration_rows
from spmconvert.errors import OptionError
from spmconvert.fit.layer import fit_layer
from spmconvert.fit.progress import Silent
from spmconvert.model.swap import replace_module
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan.plan import ConversionPlan, plan_conversion, statistics_groups
from spmconvert.recipe.recipe import Recipe


def convert_in_memory_(model: Any, files: Sequence[Path], recipe: Recipe) -> dict[str, LayerSpec]:
    """Fit and swap the layers of a model that is loaded already, in place; returns its layer map.

    All layers are fitted on the dense model's activations, since nothing can be stored between two of them.

    Args:
        model: the dense model.
        files: weight files that it was loaded from, in one directory.
        recipe: what to do.

    Raises:
        SpmconvertError: as for ``convert``.
    """
    if recipe.fit.sequential:
        raise OptionError("sequential fits are not made while a model is loaded; use spmconvert.convert, or leave them out")
    source = open_loaded(model.config._name_or_path, files)
    plan = plan_conversion(source, model, recipe)
    rows = calibration_rows(tokenizer_place(source), model.config, recipe)
    silent = Silent()
    if recipe.budget.limits:
        check_reachable(plan, recipe.budget)
        identity = CacheIdentity.of_model(model)
        curves = measure_curves(source, plan, recipe, identity, rows, lambda: model, silent.calibrating, silent.measured)
        plan = allocate(curves, recipe.budget).plan
    replacements = dict(_fitted_layers(model, plan, recipe, rows))
    # only now, so that every layer was calibrated on the dense model
    for name, replacement in replacements.items():
        replace_module(model, name, replacement.train(model.training))
    return {layer.target.name: layer.spec for layer in plan.layers}


def _fitted_layers(
    model: Any, plan: ConversionPlan, recipe: Recipe, rows: CalibrationRows | None
) -> Iterator[tuple[str, SPMLinear]]:
    """The replacement of every planned layer by name, in the dtype of the model or the one that the recipe names."""
    weighted = recipe.weights_fits
    for group in statistics_groups(plan.layers, weighted=weighted):
        moments: dict[str, Moments] = {}
        if rows is not None:
            moments = gather_moments(model, group, rows, Silent().calibrating, weighted=weighted, seed=recipe.seed)
        for layer in group:
            name = layer.target.name
            module = model.get_submodule(name)
            weight = module.weight.detach().t() if layer.spec.fan_in_fan_out else module.weight.detach()
            bias = None if module.bias is None else module.bias.detach()
            fitted, _ = fit_layer(
                layer, weight, bias, moments.get(name), iterations=recipe.fit.iterations, seed=recipe.seed
            )
            yield name, fitted.to(module.weight.dtype if layer.spec.dtype is None else fitted.weight.dtype)
