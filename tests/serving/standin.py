"""vLLM's side of a quantisation plugin, as far as this package meets it, for tests where there is no vLLM.

vLLM is no dependency of the tests: its wheel is 336 MB and for CUDA. These classes have the names, signatures, order of
events and checks of vLLM 0.33.0, and nothing of its kernels:

- ``model_executor/layers/quantization/__init__.py``: ``register_quantization_config``, ``get_quantization_config``
- ``model_executor/layers/quantization/base_config.py``: ``QuantizeMethodBase``, ``QuantizationConfig``
- ``model_executor/layers/linear.py``: ``LinearMethodBase``, ``UnquantizedLinearMethod``, ``LinearBase`` and the layers made
  of it, their constructors' order (method, weights, then the bias or ``register_parameter("bias", None)``), how they divide
  by ranks, and ``weight_loader`` of weights that they own
- ``model_executor/models/utils.py``: ``WeightsMapper`` with ``orig_to_new_stacked``, ``get_rename_mapper``, and the walk of
  ``AutoWeightsLoader``, which leaves a bias out that nothing in the model is called after
- ``model_executor/models/gpt_neox.py`` and others: the loop over ``stacked_params_mapping`` of older models

``benchmarks/serving.py`` runs the real ones.
"""

import sys
from abc import ABC, abstractmethod
from types import ModuleType

import torch
from torch import nn

REGISTERED = {}


def register_quantization_config(name):
    def register(config):
        if not issubclass(config, QuantizationConfig):
            raise ValueError("not a QuantizationConfig")
        REGISTERED[name] = config
        return config

    return register


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return


class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    def apply_vllm_mapper(self, hf_to_vllm_mapper):
        return


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def apply(self, layer, x, bias=None): ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, inputs, outputs, input_size, output_size, params_dtype, **extra_weight_attrs):
        weight = nn.Parameter(torch.full((sum(outputs), inputs), torch.nan, dtype=params_dtype), requires_grad=False)
        weight.output_dim = 0
        weight.weight_loader = extra_weight_attrs["weight_loader"]
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer):
        # as on a CPU: packed for its own product, and nothing left for any other
        layer.packed = layer.weight.data.t().contiguous()
        layer.weight = nn.Parameter(torch.empty(0, dtype=layer.packed.dtype), requires_grad=False)

    def apply(self, layer, x, bias=None):
        y = x @ layer.packed
        return y if bias is None else y + bias


class LinearBase(nn.Module):
    def __init__(self, input_size, output_sizes, bias, quant_config, prefix, *, inputs_here, outputs_here):
        super().__init__()
        self.has_bias, self.prefix, self.output_sizes = bias, prefix, output_sizes
        # memory that vLLM allocates holds anything; here what did not come is not a number
        dtype = torch.get_default_dtype()
        self.quant_method = quant_config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self,
            inputs_here,
            outputs_here,
            input_size,
            sum(output_sizes),
            dtype,
            weight_loader=self.weight_loader,
        )
        if bias:
            self.bias = nn.Parameter(torch.full((sum(outputs_here),), torch.nan, dtype=dtype), requires_grad=False)
            self.bias.output_dim = 0
            self.bias.weight_loader = self.weight_loader
        else:
            self.register_parameter("bias", None)

    def position(self, shard):
        return shard

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        target = param.data
        if loaded_shard_id is not None:
            position = self.position(loaded_shard_id)
            target = target.narrow(param.output_dim, sum(self.output_sizes[:position]), self.output_sizes[position])
        assert target.shape == loaded_weight.shape
        target.copy_(loaded_weight)

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias), None


class ColumnParallelLinear(LinearBase):
    def __init__(self, input_size, output_sizes, bias=False, quant_config=None, prefix="", tp_size=1):
        here = [size // tp_size for size in output_sizes]
        super().__init__(input_size, output_sizes, bias, quant_config, prefix, inputs_here=input_size, outputs_here=here)


class RowParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, bias=False, quant_config=None, prefix="", tp_size=1):
        here = input_size // tp_size
        super().__init__(
            input_size, [output_size], bias, quant_config, prefix, inputs_here=here, outputs_here=[output_size]
        )


class FusedLinear(ColumnParallelLinear):
    """What ``MergedColumnParallelLinear`` and ``QKVParallelLinear`` share."""

    def load_weights(self, weights):
        for name, tensor in weights:
            shard = getattr(tensor, "shard_id", None)
            owner, _, last = name.rpartition(".")
            param = getattr(self.get_submodule(owner), last, self)
            if param is None and name == "bias":
                continue
            param.weight_loader(param, tensor, shard)
            yield name


class MergedColumnParallelLinear(FusedLinear):
    pass


class QKVParallelLinear(FusedLinear):
    def position(self, shard):
        return "qkv".index(shard)


class WeightsMapper:
    def __init__(self, stacked=None, prefixes=None):
        self.stacked, self.prefixes = stacked or {}, prefixes or {}

    def get_rename_mapper(self):
        return WeightsMapper(prefixes=self.prefixes)

    def map(self, name):
        shard = None
        for part, (new, found) in self.stacked.items():
            if part in name:
                name, shard = name.replace(part, new, 1), found
        for old, new in self.prefixes.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        return name, shard

    def apply_dict(self, values):
        return {self.map(name)[0]: value for name, value in values.items()}

    def apply(self, weights):
        for name, tensor in weights:
            new, shard = self.map(name)
            if shard is not None:
                tensor = tensor.detach()
                tensor.shard_id = shard
            yield new, tensor


def load_by_walking(model, weights, mapper):
    """``AutoWeightsLoader``."""
    for name, tensor in mapper.apply(weights):
        _walk(model, name, name, tensor)


def _walk(module, name, rest, tensor):
    first, _, inner = rest.partition(".")
    if isinstance(module, FusedLinear):
        list(module.load_weights([(rest, tensor)]))
    elif first in dict(module.named_children()):
        _walk(module.get_submodule(first), name, inner, tensor)
    elif first in dict(module.named_parameters(recurse=False)):
        assert not inner
        param = getattr(module, first)
        getattr(param, "weight_loader", _copy)(param, tensor)
    elif not name.endswith(".bias"):
        raise ValueError(f"There is no module or parameter named {name!r}")


def load_by_name(model, weights, stacked):
    """The loop of models that have a list of stacked parameters."""
    params = dict(model.named_parameters())
    for name, tensor in weights:
        for part, (new, shard) in stacked.items():
            if part not in name:
                continue
            renamed = name.replace(part, new)
            if not (renamed.endswith(".bias") and renamed not in params):
                params[renamed].weight_loader(params[renamed], tensor, shard)
            break
        else:
            if not (name.endswith(".bias") and name not in params):
                getattr(params[name], "weight_loader", _copy)(params[name], tensor)


def _copy(param, tensor):
    assert param.shape == tensor.shape
    param.data.copy_(tensor)


def install(monkeypatch):
    """Put the classes where vLLM has them; modules that subclass them are imported anew."""
    layers = "vllm.model_executor.layers"
    homes = {
        f"{layers}.quantization": (register_quantization_config,),
        f"{layers}.quantization.base_config": (QuantizationConfig, QuantizeMethodBase),
        f"{layers}.linear": (LinearBase, LinearMethodBase, UnquantizedLinearMethod),
    }
    for name in ("vllm", "vllm.model_executor", layers, *homes):
        module = ModuleType(name)
        for found in homes.get(name, ()):
            setattr(module, found.__name__, found)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "spmconvert.serving.quantization", raising=False)
    REGISTERED.clear()
