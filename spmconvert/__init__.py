"""spmconvert: replace dense layers of pretrained models by near-linear Stagewise Pairwise Mixers.

Importing the package registers the checkpoint format with transformers, and LoRA beside its layers with PEFT: at once where
they are loaded already, otherwise at the moment they are. The names below are imported when they are first used. Both keep
``import spmconvert``, and with it the command line's help and option errors, free of the seconds that torch and
transformers take to import. What is imported here comes before ``__main__`` can put the path of imports in order, so it is
little.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spmconvert.version import __version__

if TYPE_CHECKING:
    from spmconvert.commands.convert import convert
    from spmconvert.commands.export import export
    from spmconvert.commands.finetune import finetune
    from spmconvert.commands.report import report
    from spmconvert.commands.verify import verify
    from spmconvert.fit.solver import fit_linear
    from spmconvert.hf import SPMConfig, swap_
    from spmconvert.model.int8 import quantize_
    from spmconvert.model.loading import load
    from spmconvert.operator.linear import SPMLinear

__all__ = [
    "SPMConfig",
    "SPMLinear",
    "__version__",
    "convert",
    "export",
    "finetune",
    "fit_linear",
    "load",
    "quantize_",
    "report",
    "swap_",
    "verify",
]

_HOMES = {
    "SPMConfig": "spmconvert.hf",
    "SPMLinear": "spmconvert.operator.linear",
    "convert": "spmconvert.commands.convert",
    "export": "spmconvert.commands.export",
    "finetune": "spmconvert.commands.finetune",
    "fit_linear": "spmconvert.fit.solver",
    "load": "spmconvert.model.loading",
    "quantize_": "spmconvert.model.int8",
    "report": "spmconvert.commands.report",
    "swap_": "spmconvert.hf",
    "verify": "spmconvert.commands.verify",
}
# what is imported right after another package's module, so that it knows what is here
_FOLLOWERS = {
    "transformers.quantizers.auto": "spmconvert.hf",
    "peft": "spmconvert.adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spmconvert' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


class _ImportAfter:
    """Imports a module of this package right after the one that it registers something with.

    Others only ask where a module is, without importing it, so this stays in place until it has been.
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the real module and extend its loader; every other module is left to the other finders."""
        if fullname not in _FOLLOWERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_FOLLOWERS[fullname])

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _ImportAfter())
for _known, _follower in _FOLLOWERS.items():
    if _known in sys.modules:
        importlib.import_module(_follower)
