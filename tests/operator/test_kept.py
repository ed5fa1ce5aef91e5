"""Merged blocks that are kept between calls: they are used again, never after a change, and hold no parameter's memory."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize

from spmconvert.operator.kept import KeptBlocks
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.merged import merge_stages
from spmconvert.operator.triton.merge import merge_stages_triton

# freed memory is given out again, though not at every try
TRIES = 8


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return SPMLinear(96, 200, rank=3).eval()


def blocks_of(layer):
    with torch.no_grad():
        layer(torch.randn(2, layer.in_features))
    return layer.spm._cache.blocks


def assert_up_to_date(layer):
    """Outputs without gradients are those of the parameters as they are now."""
    with torch.no_grad():
        x = torch.randn(3, 96)
        expected = torch.nn.functional.linear(x, layer.to_dense(), layer.held_bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_blocks_are_kept(layer):
    assert blocks_of(layer) is blocks_of(layer)
    layer.requires_grad_(False)
    layer(torch.randn(2, 96))
    assert blocks_of(layer) is blocks_of(layer)
    with torch.inference_mode():
        layer(torch.randn(2, 96))
    assert blocks_of(layer) is blocks_of(layer)


def test_blocks_are_those_of_the_dtype_and_of_the_merge(layer):
    x = torch.randn(3, 96)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            assert layer(x.to(dtype)).dtype == dtype
    parameters = (layer.spm.weight, layer.spm.scale_in, layer.spm.scale_out)
    kept = KeptBlocks.of([], torch.float32, merge_stages, parameters)
    assert kept.serve(torch.float32, merge_stages, parameters)
    assert not kept.serve(torch.float32, merge_stages_triton, parameters)


def test_meta_parameters():
    with torch.device("meta"):
        layer = SPMLinear(96, 200).eval()
    with torch.no_grad():
        for _ in range(2):
            assert layer(torch.empty(3, 96, device="meta")).shape == (3, 200)


def another_state():
    return SPMLinear(96, 200, rank=3).state_dict()


def twice(change):
    """The second time, new numbers may lie where those lay that were merged."""

    def apply(layer):
        change(layer)
        change(layer)

    return apply


def replace_data(layer):
    layer.spm.scale_out.data = torch.randn(208)


def replace_parameter(layer):
    layer.spm.scale_out = torch.nn.Parameter(torch.randn(208))


def assign(layer):
    # one parameter only: all of them seldom come back to their places
    layer.load_state_dict({"spm.scale_in": torch.randn(208)}, strict=False, assign=True)


def reverse_in_memory(layer):
    # both lie in one storage, so that only the offset tells them apart
    halves = torch.randn(2, 208)
    layer.spm.scale_in.data = halves[0]
    blocks_of(layer)
    layer.spm.scale_in.data = halves[1]


def take_over(layer):
    # same storage, and a version counter that begins anew
    layer.spm.scale_out.data.mul_(2)
    layer.spm.scale_out = torch.nn.Parameter(layer.spm.scale_out.data)


def optimizer_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    layer(torch.randn(2, 96)).sum().backward()
    optimizer.step()


def multiply(layer):
    with torch.no_grad():
        layer.spm.scale_in.mul_(2)


CHANGES = {
    "in place": multiply,
    "optimizer": optimizer_step,
    "load_state_dict": lambda layer: layer.load_state_dict(another_state()),
    "assign": twice(assign),
    "new parameter": twice(replace_parameter),
    "new parameter on the old storage": take_over,
    "new data": twice(replace_data),
    "new data on the old storage": reverse_in_memory,
    "double": lambda layer: layer.double().float(),
    "half": lambda layer: layer.half().float(),
    "train": lambda layer: layer.train().eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_are_merged_again_after_a_change(layer, change):
    for _ in range(TRIES):
        before = blocks_of(layer)
        CHANGES[change](layer)
        assert_up_to_date(layer)
        assert layer.spm._cache.blocks is not before


class Scaled(torch.nn.Module):
    """A parametrization with a number of its own."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.factor


def test_parametrizations_are_merged_at_every_call(layer):
    parametrize.register_parametrization(layer.spm, "weight", Scaled())
    for factor in range(TRIES):
        with torch.no_grad():
            layer.spm.parametrizations.weight[0].factor.fill_(factor / TRIES)
        assert_up_to_date(layer)
        assert layer.spm._cache is None, "blocks that no call will ask for again are not kept"


def test_parametrizations_are_computed_once_a_call(layer):
    calls = []
    scaled = Scaled()
    scaled.register_forward_hook(lambda *_: calls.append(1))
    parametrize.register_parametrization(layer.spm, "weight", scaled)
    calls.clear()
    layer(torch.randn(3, 96))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_parameters_swapped_in_for_a_call(layer, kind):
    x = torch.eye(96)
    with torch.no_grad():
        unscaled = layer(x) - layer.held_bias
        for factor in range(TRIES):
            scaled = {"spm.scale_out": kind(layer.spm.scale_out * factor)}
            found = torch.func.functional_call(layer, scaled, (x,)) - layer.held_bias
            del scaled
            torch.testing.assert_close(found, factor * unscaled, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x) - layer.held_bias, unscaled)


def test_tensors_swapped_in_for_a_call_leave_the_blocks_alone(layer):
    blocks = blocks_of(layer)
    with torch.no_grad():
        torch.func.functional_call(layer, {"spm.weight": torch.randn_like(layer.spm.weight)}, (torch.randn(3, 96),))
    assert blocks_of(layer) is blocks


def test_blocks_of_a_transform_do_not_outlive_it(layer):
    layer.requires_grad_(False)
    x = torch.randn(96)
    for _ in range(2):
        hessian = torch.func.hessian(lambda row: layer(row).square().sum())(x)
        torch.testing.assert_close(hessian, 2 * layer.to_dense().t() @ layer.to_dense(), rtol=1e-4, atol=1e-4)


def test_parameters_gathered_for_a_call(layer, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        expected, x = copy.deepcopy(layer), torch.randn(3, 96)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = fully_shard(torch.nn.Sequential(fully_shard(layer, mesh=mesh)), mesh=mesh)
        for _ in range(TRIES):
            with torch.no_grad():
                torch.testing.assert_close(sharded(x), expected(x))
                for parameter in [*sharded.parameters(), *expected.parameters()]:
                    parameter.mul_(1.5)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["weight", "scale_in", "scale_out"])
def test_nothing_is_kept_for_inference_tensors(layer, name):
    with torch.inference_mode():
        setattr(layer.spm, name, torch.nn.Parameter(getattr(layer.spm, name).clone()))
        assert_up_to_date(layer)
        getattr(layer.spm, name).mul_(2)
        assert_up_to_date(layer)


def test_inference_mode_and_back(layer):
    x = torch.randn(3, 96)
    with torch.inference_mode():
        first = layer(x)
    y = layer(x)
    torch.testing.assert_close(y, first.clone())
    y.sum().backward()
    assert layer.spm.weight.grad is not None


def test_blocks_hold_no_parameter(layer):
    blocks_of(layer)
    parameter, storage = weakref.ref(layer.spm.weight), StorageWeakRef(layer.spm.scale_in.untyped_storage())
    layer.spm.weight = torch.nn.Parameter(torch.randn_like(layer.spm.weight))
    layer.spm.scale_in.data = torch.ones(208)
    gc.collect()
    assert parameter() is None
    assert storage.expired()


def test_conversions_and_loading_drop_the_blocks_at_once(layer):
    for change in (lambda: layer.half().float(), lambda: layer.load_state_dict(another_state()), layer.eval):
        blocks_of(layer)
        change()
        assert layer.spm._cache is None


def test_loading_and_converting_by_swapped_tensors(layer):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        blocks_of(layer)
        layer.load_state_dict(another_state())
        assert_up_to_date(layer)
        layer.double().float()
        assert_up_to_date(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_copies_leave_the_blocks_behind(layer):
    x = torch.randn(4, 96)
    with torch.no_grad():
        expected = layer(x)
    assert layer.spm._cache is not None
    assert copy.copy(layer.spm)._cache is None
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.spm._cache is None
        with torch.no_grad():
            assert torch.equal(other(x), expected)
