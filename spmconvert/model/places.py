"""The place of a module in a model: what lies around it, and another one put there.

The code goes into checkpoints that carry their own (``exporting/source``), so it imports nothing but torch.
"""

from typing import Any

from torch import nn


def put_module(parent: nn.Module, child: str, module: nn.Module) -> None:
    """Put a module in the place of a child, in lists that the parent keeps beside its children, too.

    The prediction heads of MaskFormer, Mask2Former and OneFormer run a plain list that has their layers a second time.
    """
    before = getattr(parent, child)
    setattr(parent, child, module)
    for key, value in vars(parent).items():
        if isinstance(value, (list, tuple)) and any(item is before for item in value):
            changed: Any = [module if item is before else item for item in value]
            setattr(parent, key, changed if isinstance(value, list) else tuple(changed))


def modules_around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that the layer of a name lies in and that have no tensor of their own, without models in the model."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    return [module for module in around if not (_has_tensors(module) or hasattr(module, "base_model_prefix"))]


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
