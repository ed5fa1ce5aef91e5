"""One row of what a model reads, whatever that is: token ids, or an item of a processor's tensors."""

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spmconvert.data.media import MediaRow, media_batch
from spmconvert.data.tokens import padded_batch

# token ids [tokens] (int64), or an item
Row = Tensor | MediaRow


def row_batch(rows: Sequence[Row], padding: int, model: Any) -> dict[str, Any]:
    """Rows of one kind as keyword arguments of a model, on its device.

    Args:
        rows: at least one.
        padding: token id that fills short rows.
        model: that reads them.
    """
    items = [row for row in rows if isinstance(row, MediaRow)]
    if items:
        return media_batch(items, model)
    return padded_batch([row for row in rows if isinstance(row, Tensor)], padding, model)


def row_key(row: Row) -> bytes:
    """The same for equal rows, and for others another."""
    tensors = {"": row} if isinstance(row, Tensor) else row.tensors
    parts = [f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes() for name, tensor in tensors.items()]
    return hashlib.sha256(b"".join(parts)).digest()
