"""A converted model as ``model.onnx``, through transformers' own exporter, and run once by onnxruntime.

Any number of rows and tokens, outputs by the names that the model has for them, no cache; of a sentence-transformers
directory pooling and what comes after it are in the graph, as ``sentence_embedding``. Weights are float32, which every
runtime computes in; tools of onnxruntime make halves or integers of them. Above ``LARGEST_FILE`` they lie in a file beside.
"""

import json
from pathlib import Path
from typing import Any

import torch

from spmconvert.checkpoint.converted import Converted
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.errors import BackendError
from spmconvert.exporting.form import Written, add_companions, card, plain_config
from spmconvert.exporting.graph import Batch, GraphForm, Recorded

FILE = "model.onnx"
# protobuf ends at two
LARGEST_FILE = 1 << 30
# of onnxruntime's log: errors
ERRORS = 3
_CARD = f"""`{FILE}`, for onnxruntime and others:

```python
session = onnxruntime.InferenceSession("{FILE}")
outputs = session.run(None, {{"input_ids": ids, "attention_mask": mask}})
```

Any number of rows and tokens; no cache; float32. Layers are the products that they are made of, 2:4 ones dense matrices."""


class Onnx(GraphForm):
    """The ONNX form of a converted checkpoint.

    Raises:
        BackendError: when a package is missing.
        UnsupportedLayerError: when layers are those of experts or of a recurrence.
    """

    def __init__(self, converted: Converted) -> None:
        try:
            import onnx_ir  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise BackendError(f"{error.name} is not installed; pip install 'spmconvert[onnx]'") from None
        super().__init__(converted)

    def write(self, target: OutputDirectory) -> Written:
        """Record, save, run by onnxruntime and compare."""
        import onnx_ir

        recorded = Recorded.of(self.converted, torch.float32)
        program = recorded.exported("exporter_onnx:OnnxExporter", "OnnxConfig")
        _name_axes(program, recorded.dynamic_axes())
        size = sum(value.const_value.nbytes for value in program.graph.initializers.values())
        file = target.final / FILE
        onnx_ir.save(program, file, external_data=f"{FILE}.data" if size > LARGEST_FILE else None)
        target.add_text("config.json", json.dumps(plain_config(self.converted), indent=2) + "\n")
        target.add_text("README.md", card(self.converted, "as ONNX", _CARD))
        add_companions(self.converted, target)
        comparison = recorded.compare(_Session(file), "onnxruntime")
        written = sum(path.stat().st_size for path in target.final.glob(f"{FILE}*"))
        return Written(written, comparison)


class _Session:
    """A graph in onnxruntime."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, batch: Batch) -> Batch:
        """Outputs by name."""
        names = [output.name for output in self._session.get_outputs()]
        inputs = {value.name for value in self._session.get_inputs()}
        found = self._session.run(names, {name: value.numpy() for name, value in batch.items() if name in inputs})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))


def _name_axes(program: Any, axes: dict[str, dict[int, str]]) -> None:
    """Call the free axes of inputs by their names, everywhere."""
    import onnx_ir

    names: dict[str, str] = {}
    for value in program.graph.inputs:
        for axis, name in axes.get(value.name, {}).items():
            names[str(value.shape[axis])] = name
    values = [*program.graph.inputs, *(output for node in program.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(str(size), size) for size in value.shape])
