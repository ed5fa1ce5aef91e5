"""One name in two places: with and without the prefix of the base model.

``BertForMaskedLM`` calls a layer ``bert.encoder.layer.0.output.dense``; a checkpoint of ``BertModel`` calls it
``encoder.layer.0.output.dense``, and transformers loads each into the other. A name is therefore looked up as it is, then
without the prefix, then with it; nothing else counts as the same, since a model may hold one tower inside of another
(``encoder.layer.0.fc`` and ``qformer.encoder.layer.0.fc``). Modules, tensors, parameters and layer maps all ask here.
"""

from collections.abc import Collection

from spmconvert.errors import CorruptCheckpointError


def resolve_name(name: str, known: Collection[str], prefix: str) -> str | None:
    """The known name that means the same, or None.

    Args:
        name: of a module, a parameter or a tensor.
        known: names of the other side.
        prefix: ``base_model_prefix`` of the model's class, or empty.
    """
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if prefix else (name,)
    return next((candidate for candidate in candidates if candidate in known), None)


def stacked_name(layer: str) -> str:
    """What the layer of one expert is stacked in: ``mlp.experts.3.down`` in ``mlp.experts.down``."""
    experts, _, projection = layer.rsplit(".", 2)
    return f"{experts}.{projection}"


def expert_names(stacked: str, count: int) -> list[str]:
    """The inverse, for so many experts."""
    experts, _, projection = stacked.rpartition(".")
    return [f"{experts}.{index}.{projection}" for index in range(count)]


def shared_prefix(names: Collection[str], known: Collection[str]) -> str:
    """The prefix by which all of some names differ from the known ones; empty where they are known as they are.

    Args:
        names: of layers, as a layer map has them.
        known: names of the modules that a checkpoint has tensors of.

    Raises:
        CorruptCheckpointError: when a name is not there, or several prefixes would do.
    """
    missing = sorted(set(names) - set(known))
    if not missing:
        return ""
    first = missing[0]
    added = {other.removesuffix(f".{first}") for other in known if other.endswith(f".{first}")}
    dropped = {first.removesuffix(f".{other}") for other in known if first.endswith(f".{other}")}
    fitting = sorted(
        prefix for prefix in added | dropped if all(resolve_name(name, known, prefix) is not None for name in missing)
    )
    if len(fitting) != 1:
        problem = f"several places for it ({', '.join(fitting)})" if fitting else "no tensors of it"
        raise CorruptCheckpointError(
            f"the layer map names {first}, and the checkpoint has {problem}; download it or convert it again"
        )
    return fitting[0]
