"""The classes that vLLM asks for: a ``QuantizationConfig`` made of the layer map, and the ``LinearMethod`` of SPM layers.

Only ``plugin.register`` imports this module, inside of vLLM's processes. It is the thin part: which layers of the
checkpoint a layer of vLLM stands for is in ``partitions``, how their tensors arrive and what is computed in ``loading``.
Products with one matrix are vLLM's own: on a CPU its packed ones take a third of the time of torch's.

What it gives up, each refused by name: tensor parallelism of replaced layers (a stage mixes any coordinates, so neither
rows nor columns can be left out), opened experts and recurrences (vLLM keeps a block's experts in one kernel), Conv1D
layers (vLLM transposes every tensor of theirs while it loads), and biases where vLLM's model has none. Weights that are
loaded a second time into a running engine are not seen. Of a bias that vLLM keeps itself, and of dense layers, it does not
say that the file lacks them, as for every quantised checkpoint (``enable_weights_track`` makes it).
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from spmconvert.checkpoint.manifest import INT8_KEY, QUANT_METHOD, LayerSpec, check_format_version, single_layers
from spmconvert.errors import CheckpointError, UnsupportedLayerError
from spmconvert.model.opening import opened_names
from spmconvert.serving.loading import Incoming, check_bias
from spmconvert.serving.partitions import REMEDY, check_whole, has_replaced, partitions_of


class SPMQuantizationConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM makes of ``quantization_config`` in config.json.

    Args:
        layers: the layer map.

    Raises:
        UnsupportedLayerError: when it names a layer of a form that vLLM does not keep as one.
    """

    def __init__(self, layers: dict[str, LayerSpec]) -> None:
        super().__init__()
        for name, spec in layers.items():
            if spec.fan_in_fan_out:
                raise UnsupportedLayerError(
                    f"layer {name} is a Conv1D, whose tensors vLLM transposes while it loads them; {REMEDY}"
                )
        if opened := sorted(opened_names(single_layers(layers))):
            raise UnsupportedLayerError(f"{opened[0]} has replaced layers inside, and vLLM keeps it in one piece; {REMEDY}")
        self.layers = layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers)"

    def get_name(self) -> str:
        """The name that config.json has."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Ordinary floating point."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: all products are torch's own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SPMQuantizationConfig":
        """Read the layer map.

        Raises:
            CheckpointError: when its format is another, or it cannot be read.
        """
        check_format_version(config.get("format_version"))
        layers = config.get("layers")
        if not isinstance(layers, dict) or not layers:
            raise CheckpointError("quantization_config has no layer map; download the checkpoint or convert again")
        if config.get(INT8_KEY) is not None:
            raise CheckpointError(f"vLLM does not run {config[INT8_KEY]} of converted layers; serve what it was made from")
        return cls({name: LayerSpec.from_json(name, entry) for name, entry in layers.items()})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call the layers as vLLM's model does."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is loaded and computed; None, as vLLM would do it, for what is no linear layer."""
        if not isinstance(layer, LinearBase):
            return None
        replaced = has_replaced(prefix, self.packed_modules_mapping, self.layers)
        return SPMLinearMethod(self, prefix) if replaced else UnquantizedLinearMethod()


class SPMLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads and computes a layer of vLLM that has SPM layers in it.

    Args:
        config: with the layer map.
        prefix: name of the layer.
    """

    def __init__(self, config: SPMQuantizationConfig, prefix: str) -> None:
        self.config, self.prefix = config, prefix
        self.dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Put places for the tensors of the checkpoint into the layer; sizes as vLLM gives them.

        Raises:
            UnsupportedLayerError: when the layer is to be split, or has a bias that vLLM has no place for.
            CheckpointError: when a layer of the map does not fit.
        """
        given = (input_size_per_partition, sum(output_partition_sizes))
        check_whole(self.prefix, given, (input_size, output_size))
        packed, layers = self.config.packed_modules_mapping, self.config.layers
        partitions = partitions_of(self.prefix, output_partition_sizes, packed, layers)
        for partition in partitions:
            check_bias(partition, has_bias=layer.has_bias)
        incoming = Incoming(partitions, input_size, params_dtype)
        incoming.add_places_(layer)
        layer.incoming = incoming

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the places away and freeze what came.

        Raises:
            CorruptCheckpointError: when a tensor of an SPM layer, or of a dense one beside it, did not come.
        """
        incoming: Incoming | None = layer.__dict__.pop("incoming", None)
        if incoming is None:
            return
        layer.served = incoming.finish(layer.bias)
        for product in layer.served.products():
            self.dense.process_weights_after_loading(product)
            product.multiply = self._multiply
        incoming.remove_places_(layer)

    def _multiply(self, product: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """As vLLM multiplies on this platform, which may want a bias of its own making in another dtype."""
        y: Tensor = self.dense.apply(product, x)
        return y if bias is None else y + bias

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X [..., in_features] -> [..., out_features], plus a bias [out_features]."""
        y: Tensor = layer.served(x, bias)
        return y
