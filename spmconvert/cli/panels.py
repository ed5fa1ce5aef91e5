"""Which options of a command belong together: the panels of its help, and the sections of docs/options.md.

The table stands here and not at every option, so that the order of panels can be read in one place. An option that the
table leaves out is an error when the command is built, not a line that nobody finds.
"""

from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand, TyperOption

Panels = Mapping[str, tuple[str, ...]]

PANELS: dict[str, Panels] = {
    "convert": {
        "What to replace": ("targets", "ignore", "layers"),
        "A budget, which chooses the design of every layer": (
            *("speedup", "keep", "keep_bytes", "keep_flops", "max_error"),
            *("tokens", "rows", "allow_slower", "structures", "sensitivity"),
        ),
        "A design by hand": ("stages", "rank", "block", "variant", "dtype", "new_bias"),
        "Data and fit": ("calib", "refine", "sequential", "seed"),
        "Run": ("recipe", "set_", "device", "num_processes", "dry_run", "resume", "measure"),
        "Output": ("output", "force", "as_json"),
    },
    "finetune": {
        "Data": ("data", "block_size", "seed"),
        "Training": ("minutes", "steps", "lr", "batch_size", "train"),
        "Teacher": ("teacher", "teacher_device", "store_logits", "teacher_logits"),
        "Run": ("recipe", "set_", "device", "num_processes", "shard", "tracker", "resume", "measure"),
        "Output": ("output", "in_place", "force", "as_json"),
    },
    "report": {
        "Data": ("data", "other_data", "rows", "tasks"),
        "Rivals": ("baselines", "int8", "quick", "calib", "teacher"),
        "Run": ("device", "seconds"),
        "Output": ("output", "as_json"),
    },
    "verify": {"Run": ("teacher",), "Output": ("as_json",)},
    "export": {"Output": ("form", "output", "force", "as_json")},
    "push": {"The repository": ("private", "revision", "message"), "Output": ("as_json",)},
    "eval": {},
    "demo": {"Run": ("steps",), "Output": ("output", "force")},
}


class PanelCommand(TyperCommand):
    """A command whose options stand in the panels that ``PANELS`` gives it, in that order."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        panels = PANELS[str(name)]
        order = [option for options in panels.values() for option in options]
        found = {str(param.name): param for param in self.params if isinstance(param, TyperOption)}
        if set(order) != set(found):
            raise LookupError(f"options of {name} in its code or in its panels alone: {set(order) ^ set(found)}")
        for panel, options in panels.items():
            for option in options:
                found[option].rich_help_panel = panel
        arguments = [param for param in self.params if not isinstance(param, TyperOption)]
        self.params = [*arguments, *(found[option] for option in order)]
