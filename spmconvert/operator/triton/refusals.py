"""What the Triton backend refuses: ``torch.func`` and forward-mode differentiation, before anything is computed.

``torch.vmap`` would need a batch beside the tokens, which are one already. ``torch.func.grad`` is refused by torch for
every operator of ``torch.library`` that has a gradient, by an error that names no way out. And tangents of forward-mode
differentiation are dropped there without an error, so that a derivative would come back as zero.
"""

from typing import Any, NoReturn

from spmconvert.errors import BackendError
from spmconvert.operator.reference import is_transformed


def refuse_transforms() -> None:
    """Called before a layer's operators run.

    Raises:
        BackendError: under a transform of ``torch.func`` or forward-mode differentiation.
    """
    if is_transformed():
        raise BackendError(
            "backend triton cannot run under torch.func (vmap, grad, jvp) or forward-mode differentiation; "
            "put a batch into the tokens, or use backend merged or reference"
        )


def refuse_batched_gradients(info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
    """What the backward operators do under ``torch.vmap``: that is gradients taken of a graph recorded outside of it.

    Raises:
        BackendError: always.
    """
    raise BackendError("backend triton cannot take batches of gradients; take one at a time, or use backend reference")
