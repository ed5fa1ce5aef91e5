"""A sentence-transformers directory as one module: the transformer, pooling, normalisation, and dense layers between them.

What ``modules.json`` lists is read here without that package, so that a graph can hold all of it. Modules that are none of
these are refused by name.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.errors import CheckpointError, UnsupportedLayerError
from spmconvert.system.parsing import parse_json

MODULES_FILE = "modules.json"
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "Sigmoid")
# ways of pooling by what 1_Pooling/config.json calls them, in the order in which they are joined
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Pooling(nn.Module):
    """One vector a row of hidden states.

    Args:
        modes: values of ``POOLING_FLAGS``; several are joined.
    """

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """States [rows, tokens, features] and mask [rows, tokens] -> [rows, features * modes]."""
        weights = mask[..., None].to(states.dtype)
        return torch.cat([self._pooled(mode, states, weights) for mode in self.modes], dim=1)

    def _pooled(self, mode: str, states: Tensor, weights: Tensor) -> Tensor:
        places = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)[None, :, None]
        if mode == "cls":
            # the first real token, where padding is on the left too
            return self._at((weights * (places.flip(1))).argmax(1), states)
        if mode == "lasttoken":
            return self._at((weights * places).argmax(1), states)
        if mode == "max":
            return states.masked_fill(weights == 0, torch.finfo(states.dtype).min).amax(1)
        if mode == "weightedmean":
            # places are counted from the first real token
            weights = weights * weights.cumsum(1)
        total = weights.sum(1).clamp_min(1e-9)
        return (states * weights).sum(1) / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)

    @staticmethod
    def _at(index: Tensor, states: Tensor) -> Tensor:
        return states.gather(1, index[:, None].expand(-1, 1, states.shape[2])).squeeze(1)


class Normalize(nn.Module):
    """Rows of length one."""

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [rows, features] -> the same."""
        return nn.functional.normalize(rows, dim=1)


class SentenceModel(nn.Module):
    """A transformer with what stands behind it.

    Args:
        transformer: gives hidden states first.
        pooling: of them.
        behind: what the pooled rows go through.
    """

    def __init__(self, transformer: Any, pooling: Pooling, behind: list[nn.Module]) -> None:
        super().__init__()
        self.transformer, self.pooling, self.behind = transformer, pooling, nn.Sequential(*behind)

    @property
    def config(self) -> Any:
        """That of the transformer."""
        return self.transformer.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> dict[str, Tensor]:
        """Token ids and mask [rows, tokens] -> hidden states and embeddings [rows, features]."""
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask, **inputs)[0]
        return {
            "last_hidden_state": states,
            "sentence_embedding": self.behind(self.pooling(states, attention_mask)),
        }


def with_sentence_modules(directory: Path, model: Any) -> Any:
    """The model with what ``modules.json`` puts behind it; itself where there is no such file.

    Raises:
        CheckpointError: when that cannot be read.
        UnsupportedLayerError: when it lists a module that is not known here.
    """
    file = directory / MODULES_FILE
    if not file.is_file():
        return model
    pooling: Pooling | None = None
    behind: list[nn.Module] = []
    for entry in _read(file):
        kind, place = str(entry["type"]).rpartition(".")[2], directory / str(entry["path"])
        if kind == "Pooling" and pooling is None and not behind:
            pooling = Pooling(pooling_modes(place / "config.json"))
        elif kind == "Normalize" and pooling is not None:
            behind.append(Normalize())
        elif kind == "Dense" and pooling is not None:
            behind.append(_dense(place))
        elif kind != "Transformer":
            raise UnsupportedLayerError(
                f"{file} lists a {kind}; known here are Transformer, Pooling, Dense and Normalize, in this order; remove "
                f"{file.name} from a copy of the checkpoint to export the transformer alone"
            )
    return model if pooling is None else SentenceModel(model, pooling, behind).eval()


def pooling_modes(file: Path) -> tuple[str, ...]:
    """How a pooling module's config says that rows are pooled, in either of its layouts.

    Raises:
        CheckpointError: when it names a way that is not known.
        UnsupportedLayerError: when prompts are not to be pooled.
    """
    config = _read(file)
    named = config.get("pooling_mode")
    if isinstance(named, str):
        modes = tuple(named.split("+"))
    elif isinstance(named, list):
        modes = tuple(str(mode) for mode in named)
    else:
        modes = tuple(mode for flag, mode in POOLING_FLAGS.items() if config.get(flag))
    # what sentence-transformers takes where nothing is said
    modes = modes or ("mean",)
    if config.get("include_prompt") is False:
        raise UnsupportedLayerError(
            f"{file} leaves prompts out of the pooled rows (include_prompt), which a graph does not know from the text; "
            "export with --format portable or dense"
        )
    unknown = sorted(set(modes) - set(POOLING_FLAGS.values()))
    if unknown:
        raise CheckpointError(f"{file} pools by {unknown}; known are {', '.join(POOLING_FLAGS.values())}")
    return modes


def _dense(place: Path) -> nn.Module:
    from safetensors.torch import load_file

    config = _read(place / "config.json")
    tensors = load_file(place / "model.safetensors")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise UnsupportedLayerError(f"{place} has the activation {activation}; known are {', '.join(ACTIVATIONS)}")
    linear = nn.Linear(config["in_features"], config["out_features"], bias="linear.bias" in tensors)
    linear.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in tensors.items()})
    return nn.Sequential(linear, getattr(nn, activation)())


def _read(file: Path) -> Any:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{file} cannot be read; save the model again with sentence-transformers") from None
