"""SPMLinear as a module: what it computes, how it is compiled, exported and wrapped, and what it refuses."""

import copy
import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from spmconvert.errors import BackendError, OptionError
from spmconvert.operator.design import Design
from spmconvert.operator.linear import MARK_SHAPE, SPMLinear
from spmconvert.operator.merged import CHUNK_TOKENS
from spmconvert.operator.terms.lowrank import LowRank

DESIGNS = [{}, {"variant": "rotation"}, {"block": 2}, {"rank": 3}, {"stages": 0, "rank": 2}, {"bias": False}]
ids = lambda design: "-".join(f"{k}{v}" for k, v in design.items()) or "default"  # noqa: E731


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = SPMLinear(96, 200, rank=3)
    with torch.no_grad():
        layer.lowrank.up.weight.normal_()
        layer.held_bias.normal_()
    return layer


@pytest.mark.parametrize("design", DESIGNS, ids=ids)
@pytest.mark.parametrize("shape", [(12, 12), (96, 200), (200, 96)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "merged", "auto"])
def test_forward_is_the_dense_matrix(shape, design, backend):
    torch.manual_seed(0)
    layer = SPMLinear(*shape, backend=backend, dtype=torch.double, **design)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(3, 5, shape[0], dtype=torch.double)
    expected = torch.nn.functional.linear(x, layer.to_dense(), layer.held_bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0])


SUMS = [
    [{"kind": "spm"}, {"kind": "lowrank", "rank": 3}],
    [{"kind": "spm", "stages": 0}, {"kind": "lowrank", "rank": 3}],
    [{"kind": "sparse24"}, {"kind": "lowrank", "rank": 3}],
    [{"kind": "spm", "block": 2}, {"kind": "sparse24"}],
    [{"kind": "spm", "variant": "rotation"}, {"kind": "sparse24"}, {"kind": "lowrank", "rank": 3}],
]
kinds = lambda entries: "+".join(entry["kind"] for entry in entries)  # noqa: E731


def summed(entries, bias=True, dtype=torch.double):
    """A layer of several terms that all do something."""
    torch.manual_seed(0)
    layer = SPMLinear(96, 130, bias, terms=Design.from_options(96, 130, entries).terms, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entries", SUMS, ids=kinds)
@pytest.mark.parametrize("tokens", [0, 1, 5, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 3])
def test_terms_are_added_up_in_chunks_and_otherwise(tokens, entries, bias, monkeypatch):
    layer = summed(entries, bias)
    x = torch.randn(2 * tokens, 96, dtype=torch.double)[::2]
    matrix = sum(module.matrix() for module in layer.term_modules)
    torch.testing.assert_close(layer.to_dense(), matrix)
    expected = torch.nn.functional.linear(x, matrix, layer.held_bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        # chunks also where the whole matrix would be kept
        monkeypatch.setattr(layer, "_runs_dense", False)
        called = []
        monkeypatch.setattr(layer, "_in_chunks", lambda rows: called.append(1) or SPMLinear._in_chunks(layer, rows))
        torch.testing.assert_close(layer(x), expected)
        assert called
    assert layer(x).is_contiguous()


@pytest.mark.parametrize("entries", SUMS, ids=kinds)
def test_gradients_of_terms_are_those_of_the_matrix(entries):
    layer = summed(entries)
    x = torch.randn(7, 96, dtype=torch.double, requires_grad=True)
    # without stages their parameter is empty
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.numel())]
    found = torch.autograd.grad(layer(x).square().sum(), wanted)
    expected = torch.nn.functional.linear(x, layer.to_dense(), layer.held_bias)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), wanted))


@pytest.mark.parametrize("tokens", [5, CHUNK_TOKENS + 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entries", SUMS, ids=kinds)
def test_terms_that_are_wider_than_the_inputs(entries, dtype, tokens):
    layer, x = summed(entries, dtype=torch.float32), torch.randn(tokens, 96)
    expected = layer(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = layer(x.to(dtype))
            with torch.autocast("cpu", dtype):
                cast = layer(x)
        for y in (found, cast):
            assert y.dtype == dtype
            assert (y.float() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("entries", SUMS[2:], ids=kinds)
def test_the_whole_matrix_is_kept_and_made_again_after_a_change_of_any_term(entries):
    layer, x = summed(entries), torch.randn(3, 96, dtype=torch.double)
    with torch.no_grad():
        layer(x)
        kept = layer._cache.blocks[0]
        torch.testing.assert_close(kept, layer.to_dense())
        layer(x)
        assert layer._cache.blocks[0] is kept
        for name, parameter in layer.named_parameters():
            parameter.mul_(1.5)
            expected = torch.nn.functional.linear(x, layer.to_dense(), layer.held_bias)
            torch.testing.assert_close(layer(x), expected, msg=name)
        assert all(getattr(module, "_cache", None) is None for module in layer.term_modules), "nothing twice"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entries", [*SUMS, [{"kind": "spm"}], [{"kind": "lowrank"}]], ids=kinds)
def test_the_bias_is_low_ranks_where_there_is_one(entries, bias):
    layer = SPMLinear(96, 130, bias, terms=Design.from_options(96, 130, entries).terms)
    names = [name for name, _ in layer.named_parameters() if name.endswith("bias")]
    has_low_rank = entries[-1]["kind"] == "lowrank"
    assert layer.design.bias_name == ("lowrank.up.bias" if has_low_rank else "bias")
    assert names == ([layer.design.bias_name] if bias else [])
    assert (layer.held_bias is not None) == bias
    if bias:
        assert layer.held_bias is layer.get_parameter(names[0])
        assert not layer.held_bias.any()
    assert layer.bias is (None if has_low_rank else layer.held_bias)


def test_beside_other_terms_fresh_low_rank_has_no_effect():
    for entries in SUMS:
        layer = SPMLinear(96, 130, terms=Design.from_options(96, 130, entries).terms)
        assert layer.low_rank is None or not layer.low_rank.matrix().any()
    assert SPMLinear(96, 130, stages=0, rank=3).low_rank.matrix().any()


def test_the_mark_is_no_parameter_and_fits_no_dense_layer(layer):
    assert layer.weight.shape == MARK_SHAPE == (1, 1, 1)
    assert not isinstance(layer.weight, torch.nn.Parameter)
    assert not layer.weight.requires_grad
    dense = torch.nn.Linear(96, 200)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        dense.load_state_dict(layer.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(dense.state_dict(), strict=False)
    for dtype in (torch.bfloat16, torch.double):
        assert layer.to(dtype).weight.dtype == dtype
    before = {name: p.clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        x = torch.randn(3, 96, dtype=torch.double)
        y = layer(x)
        layer.weight.fill_(7)
        assert torch.equal(layer(x), y), "nothing is computed from it"
    assert "weight" not in before


@pytest.mark.parametrize("design", DESIGNS[:5], ids=ids)
def test_fresh_layer_keeps_the_variance(design):
    torch.manual_seed(0)
    for shape in ((256, 256), (256, 1024), (1024, 256)):
        y = SPMLinear(*shape, **design)(torch.randn(500, shape[0]))
        assert 0.7 < y.std() < 1.4


def test_state_dict_and_description(layer):
    names = ["weight", "spm.weight", "spm.scale_in", "spm.scale_out", "lowrank.down.weight", "lowrank.up.weight"]
    assert list(layer.state_dict()) == [*names, "lowrank.up.bias"]
    assert layer.spm.weight.shape == (8, 2, 208, 1, 1)
    assert SPMLinear(8, 8, variant="rotation").spm.weight.shape == (3, 1, 4)
    for part in ("in_features=96", "out_features=200", "bias=True", "terms=8 stages, general + rank 3", "kept="):
        assert part in repr(layer)


@pytest.mark.parametrize("design", DESIGNS, ids=ids)
def test_parameter_count_is_the_design(design):
    layer = SPMLinear(96, 200, **design)
    bias = layer.held_bias is not None
    assert sum(p.numel() for p in layer.parameters()) == layer.design.parameter_count(bias=bias)


@pytest.mark.parametrize(
    "arguments",
    [{"stages": -1}, {"variant": "skew"}, {"block": 0}, {"rank": 97}, {"rank": -1}, {"rank": True}, {"backend": "cudnn"}],
    ids=str,
)
def test_what_is_refused(arguments):
    with pytest.raises(OptionError):
        SPMLinear(96, 200, **arguments)


def test_terms_and_numbers_are_not_given_together():
    with pytest.raises(TypeError, match="terms and stages, rank are both given"):
        SPMLinear(96, 200, terms=[LowRank(96, 200, 2)], stages=3, rank=2)
    with pytest.raises(TypeError, match="width"):
        SPMLinear(96, 200, width=208)


def test_backend_that_cannot_run_is_an_error_and_never_replaced():
    layer = SPMLinear(8, 8, backend="triton")
    with pytest.raises(BackendError, match="auto, merged or reference"):
        layer(torch.randn(2, 8))


def test_auto_takes_the_reference_for_few_tokens_in_training_only(monkeypatch):
    layer = SPMLinear(96, 96)

    def fail(*_):
        raise AssertionError

    few, many = torch.randn(2, 96), torch.randn(64, 96)
    with monkeypatch.context() as patch:
        patch.setattr("spmconvert.operator.terms.spm.merge_stages", fail)
        assert layer(few).requires_grad
        with pytest.raises(AssertionError):
            layer(many)
        with torch.no_grad(), pytest.raises(AssertionError):
            layer(few)
    SPMLinear(96, 96, backend="merged")(few)


def test_autocast(layer):
    x = torch.randn(4, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        double = copy.deepcopy(layer).double()(x.double())
    assert y.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    assert (y.float() - layer(x)).norm() / layer(x).norm() < 0.02
    y.sum().backward()
    assert layer.spm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "design", [{}, {"variant": "rotation"}, {"block": 2}, {"rank": 3}, {"stages": 0, "rank": 3}], ids=ids
)
def test_compile_without_graph_breaks(design, training):
    torch.manual_seed(0)
    # layers of other tests count towards how often one function is compiled
    torch.compiler.reset()
    layer = SPMLinear(96, 200, **design).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(300, 96, requires_grad=training)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), layer(x))
    if training:
        # of stages, or of low rank's first layer
        weight = next(layer.parameters())
        grads = torch.autograd.grad(compiled(x).square().sum(), [x, weight])
        expected = torch.autograd.grad(layer(x).square().sum(), [x, weight])
        for found, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("design", DESIGNS[:5], ids=ids)
@pytest.mark.parametrize("tokens", [2, CHUNK_TOKENS + 1])
@pytest.mark.parametrize("backend", ["reference", "merged"])
def test_transforms(backend, tokens, design):
    layers = [SPMLinear(96, 130, backend=backend, dtype=torch.double, **design) for _ in range(2)]
    x = torch.randn(2, tokens, 96, dtype=torch.double)
    torch.testing.assert_close(torch.vmap(layers[0])(x), layers[0](x))
    # a layer is affine
    tangents = [torch.func.jvp(layers[0], (x,), (x,))[1]]
    with forward_ad.dual_level():
        tangents.append(forward_ad.unpack_dual(layers[0](forward_ad.make_dual(x, x))).tangent)
    for tangent in tangents:
        torch.testing.assert_close(tangent + layers[0].held_bias, layers[0](x))
    # a layer for each batch
    stacked = {name: parameter.detach() for name, parameter in torch.func.stack_module_state(layers)[0].items()}
    call = functools.partial(torch.func.functional_call, layers[0])
    found = torch.vmap(lambda parameters, rows: call(parameters, (rows,)))(stacked, x)
    torch.testing.assert_close(found, torch.stack([layer(rows) for layer, rows in zip(layers, x, strict=True)]))
    # gradients for each batch
    single = {name: parameter.detach() for name, parameter in layers[0].named_parameters()}
    gradient = torch.func.grad(lambda parameters, rows: call(parameters, (rows,)).square().sum())
    found = torch.vmap(gradient, (None, 0))(single, x)
    for batch, rows in enumerate(x):
        wanted = torch.autograd.grad(layers[0](rows).square().sum(), list(layers[0].parameters()))
        torch.testing.assert_close([found[name][batch] for name in single], list(wanted))


def test_export_with_any_number_of_tokens(layer):
    program = torch.export.export(
        layer.eval(), (torch.randn(4, 96),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=4096)},)
    )
    for tokens in (2, 500):
        x = torch.randn(tokens, 96)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_half_precision(layer):
    x = torch.randn(4, 96)
    for dtype in (torch.float16, torch.bfloat16):
        assert copy.deepcopy(layer).to(dtype)(x.to(dtype)).dtype == dtype
    # parameters may be wider than the activations
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - layer(x)).norm() / layer(x).norm() < 0.02


def test_meta_device():
    with torch.device("meta"):
        layer = SPMLinear(96, 200, rank=2)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.empty(3, 96, device="meta")).shape == (3, 200)


def test_gradient_checkpointing(layer):
    layer, x = layer.double(), torch.randn(300, 96, dtype=torch.double, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, *layer.parameters()])
    # in other chunks, so sums are rounded differently
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


def test_distributed_data_parallel(layer, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
        x = torch.randn(300, 96)
        parallel(x).square().sum().backward()
        layer(x).square().sum().backward()
        for found, wanted in zip(parallel.module.parameters(), layer.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_region_is_computed_again_once(reentrant):
    layers = torch.nn.Sequential(SPMLinear(128, 96), SPMLinear(96, 128))
    calls = []
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3 * CHUNK_TOKENS + 7, 128, requires_grad=True)
    y = checkpoint(layers, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert len(calls) == 2
    (expected,) = torch.autograd.grad(layers(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 5, CHUNK_TOKENS + 1])
def test_outputs_are_contiguous(stages, tokens):
    layer = SPMLinear(256, 256, stages=stages)
    assert layer(torch.randn(tokens, 256)).is_contiguous()
    with torch.no_grad():
        assert layer(torch.randn(tokens, 256)).is_contiguous()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "entries",
    [
        [{"kind": "spm", "stages": 5}],
        [{"kind": "spm", "stages": 7, "block": 4}, {"kind": "lowrank", "rank": 3}],
        [{"kind": "lowrank", "rank": 3}],
        [{"kind": "sparse24"}],
        [{"kind": "monarch", "blocks_in": 2, "blocks_out": 4, "rank": 2}],
    ],
)
def test_a_tracer_writes_down_what_holds_for_other_numbers_of_tokens(entries):
    """And nothing of what is kept from call to call: two traces are compared by torch itself."""
    torch.manual_seed(0)
    layer = SPMLinear(24, 40, terms=Design.from_options(24, 40, entries).terms).eval()
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(2, 3, 24))
        x = torch.randn(3, 5, 24)
        torch.testing.assert_close(traced(x), layer(x))
