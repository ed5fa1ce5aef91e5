"""The place of a module in a model: what lies around it, and another one put there.

The code goes into checkpoints that carry their own (``exporting/source``), so it imports nothing but torch.
"""

from torch import nn


def put_module(parent: nn.Module, child: str, module: nn.Module) -> None:
    """Put a module in the place of a child, in lists that the parent keeps beside its children, too.

    The prediction heads of MaskFormer, Mask2Former and OneFormer run a plain list that has their layers a second time.
    """
    before = getattr(parent, child)
    setattr(parent, child, module)
    for key, value in vars(parent).items():
        if isinstance(value, (list, tuple)) and any(item is before for item in value):
            setattr(parent, key, type(value)(module if item is before else item for item in value))


def modules_around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that the layer of a name lies in and that have no tensor of their own, without models in the model."""
    around = [model.get_submodule(name[:end]) for end, letter in enumerate(name) if letter == "."]
    inner = [module for module in around if not hasattr(module, "base_model_prefix")]
    return [module for module in inner if not [*module.parameters(recurse=False), *module.buffers(recurse=False)]]
