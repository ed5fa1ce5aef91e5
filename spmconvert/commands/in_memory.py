"""A conversion while transformers loads a dense model: fitted and swapped in memory, nothing written."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from spmconvert.budget.cache import CacheIdentity
from spmconvert.budget.spend import Spending
from spmconvert.calibrate.moments import gather_moments
from spmconvert.calibrate.store import Moments, MomentStore
from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.checkpoint.reader import open_loaded, tokenizer_place
from spmconvert.data.calibration import calibration_rows
from spmconvert.errors import OptionError
from spmconvert.fit.layer import fit_layer
from spmconvert.fit.progress import Silent
from spmconvert.model.architecture import skeleton
from spmconvert.model.opened import opened
from spmconvert.model.opening import open_, opened_names
from spmconvert.model.swap import replace_module, stack_
from spmconvert.operator.linear import SPMLinear
from spmconvert.outputs.objective import objective_for
from spmconvert.plan.plan import LayerPlan, layer_map, plan_conversion
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
    if recipe.fit.follows_blocks:
        raise OptionError(
            "fits in sequence and refinement are not made while a model is loaded; use spmconvert.convert, or leave them"
            " out"
        )
    architecture = skeleton(model.config, type(model))
    open_(architecture)
    source = opened(open_loaded(model.config._name_or_path, files), architecture)
    plan = plan_conversion(source, architecture, recipe)
    # those that are not converted are saved as they are
    open_(model, opened_names(layer.target.name for layer in plan.layers))
    rows = calibration_rows(tokenizer_place(source), model.config, recipe, [layer.target.name for layer in plan.layers])
    silent = Silent()
    with TemporaryDirectory(prefix="spmconvert-") as folder:
        store = None if rows is None else MomentStore(Path(folder))
        if rows is not None and store is not None:
            weighted = recipe.weights_fits or recipe.predicts_loss
            gather_moments(lambda: model, plan.layers, rows, store, silent.calibrating, weighted=weighted, seed=recipe.seed)

        def moments(name: str) -> Moments | None:
            return None if store is None else store.read(name)

        if recipe.budget.limits:
            plan = (
                Spending(
                    source=source,
                    plan=plan,
                    recipe=recipe,
                    identity=CacheIdentity.of_model(model),
                    rows=rows,
                    objective=objective_for(model.config, type(model).__name__),
                    model=lambda: model,
                    chain=lambda: None,
                    moments=moments,
                    weights=partial(_dense_tensors, model),
                    device=str(model.device),
                    watch=silent,
                )
                .choose()
                .allocation.plan
            )
        replacements = {
            layer.target.name: _fitted(model, layer, moments(layer.target.name), recipe) for layer in plan.layers
        }
    # only now, so that every layer was calibrated on the dense model
    for name, replacement in replacements.items():
        replace_module(model, name, replacement.train(model.training))
    stack_(model)
    return layer_map(plan)


def _dense_tensors(model: Any, layer: LayerPlan) -> tuple[Tensor, Tensor | None]:
    """Weight [out_features, in_features] and bias of a dense layer, float32."""
    module = model.get_submodule(layer.target.name)
    weight = module.weight.detach().t() if layer.spec.fan_in_fan_out else module.weight.detach()
    return weight.float(), None if module.bias is None else module.bias.detach().float()


def _fitted(model: Any, layer: LayerPlan, moments: Moments | None, recipe: Recipe) -> SPMLinear:
    """The replacement of a layer, in the dtype of the model or the one that the recipe names."""
    weight, bias = _dense_tensors(model, layer)
    fitted, _ = fit_layer(layer, weight, bias, moments, iterations=recipe.fit.iterations, seed=recipe.seed)
    dense_dtype = model.get_submodule(layer.target.name).weight.dtype
    return fitted.to(dense_dtype if layer.spec.dtype is None else fitted.weight.dtype)
