"""A converted model as an ``ExportedProgram``: ``model.pt2``, which ``torch.export.load`` runs without transformers.

Any number of rows and tokens, outputs by name, no cache. What it gives up: loading one runs a pickle.
"""

import json

import torch

from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.exporting.form import Written, add_companions, card, plain_config
from spmconvert.exporting.graph import Batch, GraphForm, Recorded

FILE = "model.pt2"
_CARD = f"""`{FILE}`, a program that torch runs
by itself:

```python
program = torch.export.load("{FILE}").module()
outputs = program(input_ids=ids, attention_mask=mask)
```

Any number of rows and tokens; no cache. Outputs are a dictionary."""


class Program(GraphForm):
    """The program of a converted checkpoint.

    Raises:
        UnsupportedLayerError: when layers are those of experts or of a recurrence.
    """

    def write(self, target: OutputDirectory) -> Written:
        """Record, save, load again and compare."""
        recorded = Recorded.of(self.converted, "auto")
        program = recorded.exported("exporter_dynamo:DynamoExporter", "DynamoConfig")
        file = target.final / FILE
        torch.export.save(program, file)
        target.add_text("config.json", json.dumps(plain_config(self.converted), indent=2) + "\n")
        target.add_text("README.md", card(self.converted, "as a program of torch", _CARD))
        add_companions(self.converted, target)
        run = torch.export.load(file).module()

        def outputs(batch: Batch) -> Batch:
            with torch.no_grad():
                found: Batch = run(**batch)
            return found

        return Written(file.stat().st_size, recorded.compare(outputs, "torch.export.load"))
