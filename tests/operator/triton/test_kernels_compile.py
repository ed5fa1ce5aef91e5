"""Every launch that a layer makes compiles for sm_80 and sm_90 without spills and within shared memory; needs no GPU.

Each with every candidate that the tuner may choose. A default run compiles a sample; ``-m slow`` compiles all.
"""

import os
import re
import subprocess
from importlib import metadata

import pytest
import torch
from packaging import version

from spmconvert.operator.geometry import Geometry
from spmconvert.operator.merged import merge_plan
from spmconvert.operator.triton import launches, tiles
from spmconvert.operator.triton import merge as merge_ops
from spmconvert.operator.triton import mix as triton_ops
from spmconvert.operator.triton.tiles import Pass, Tile

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

# bytes of shared memory a block may have, by compute capability
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
MULTIPROCESSORS = 132
# bytes of stack that registers may spill to: the assemblers of Triton 3.7 and 3.8 need some registers more for one tile
STACK = 0 if version.parse(metadata.version("triton")) >= version.parse("3.9") else 32


def record(shape, tokens, dtype, monkeypatch, block=1, chosen=slice(None)):
    """What forward and backward of a layer would launch with the chosen candidates of tiles, without running it."""
    geometry = Geometry.create(*shape, block=block)
    plan = merge_plan(geometry)
    recorded = []

    def launch_candidates(kernel, passes, x, constants, run):
        options = tiles.candidates(kernel, passes, x.element_size())
        *others, last = options[chosen] or options
        for option in others:
            run(option)
        return last

    monkeypatch.setattr(launches, "choose", launch_candidates)
    monkeypatch.setattr(launches, "_multiprocessors", lambda x: MULTIPROCESSORS)
    for module in (launches, merge_ops):
        monkeypatch.setattr(module, "launch", lambda *parts: recorded.append(parts))
    x = torch.empty(tokens, shape[0], dtype=dtype)
    bias = torch.empty(shape[1], dtype=dtype)
    blocks = empty_blocks(plan, dtype)
    layout = [*shape, block, *(group.inner for group in plan.groups)]
    if block == 1 and dtype == torch.float32:
        record_merge(geometry, plan)
    triton_ops.mix(x, blocks, bias, layout, False)
    y, *hidden = triton_ops.mix(x, blocks, bias, layout, True)
    triton_ops.mix_backward(torch.empty_like(y), x, blocks, hidden, layout, True, True)
    return recorded


def record_merge(geometry, plan):
    weight, scale = torch.empty(geometry.stages, 2, geometry.width), torch.empty(geometry.width)
    groups = [n for g in plan.groups for n in (g.first_stage, g.stages, g.outer, g.middle, g.inner)]
    blocks = merge_ops.merge(weight, scale, scale, groups)
    merge_ops.merge_backward(blocks, weight, scale, scale, groups)


def empty_blocks(plan, dtype):
    geometry, blocks = plan.geometry, []
    for position, group in enumerate(plan.groups):
        size = group.middle * geometry.block
        batches, rows, columns = group.outer * group.inner, size, size
        if plan.input_tiles and position == 0:
            batches, rows = geometry.in_features // size, size * plan.input_tiles
        if plan.input_tiles and position == 1:
            columns = blocks[0].shape[0] * plan.input_tiles * geometry.block
        if plan.output_rows and position == len(plan.groups) - 1:
            rows = plan.output_rows * geometry.block
        blocks.append(torch.empty(batches, rows, columns, dtype=dtype))
    return blocks


def compile_launch(launch, capability):
    """Compile as a launch would: pointers and strides that are multiples of 16 are known to be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from spmconvert.operator.triton import kernels

    name, _, arguments, constants, tile = launch
    function = getattr(kernels, name)
    constants = {**constants, **{key: None for key, value in arguments.items() if value is None}}
    signature = dict.fromkeys(constants, "constexpr")
    aligned = {}
    for key, value in arguments.items():
        if key in constants:
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[key] = POINTERS[value.dtype] if tensor else "i32"
        if tensor or (key != "tokens" and value % 16 == 0):
            aligned[(function.arg_names.index(key),)] = [["tt.divisibility", 16]]
    source = ASTSource(
        function,
        signature={key: signature[key] for key in function.arg_names},
        constexprs={(function.arg_names.index(key),): value for key, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled, tmp_path):
    """Registers and bytes of stack and local memory that the assembler gave the kernel."""
    from triton import knobs

    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", file]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def distinct(recorded):
    """One of each kernel, dtype, set of constants and set of arguments that are there."""
    found = {}
    for launch in recorded:
        name, _, arguments, constants, tile = launch
        types = [value.dtype if isinstance(value, torch.Tensor) else type(value) for value in arguments.values()]
        found[name, str(types), str(constants), tile] = launch
    return list(found.values())


def assert_fits(recorded, capability, tmp_path):
    for launch in distinct(recorded):
        name, _, arguments, constants, tile = launch
        compiled = compile_launch(launch, capability)
        used = resources(compiled, tmp_path)
        told = f"sm_{capability} {name} {constants} {tile}: {used}, {compiled.metadata.shared} bytes of shared memory"
        assert used["LOCAL"] == 0, told
        assert used["STACK"] <= STACK, told
        assert compiled.metadata.shared <= 1024 * tile.shared <= SHARED_MEMORY[capability], told
        multiplies = name in ("mix_kernel", "fused_kernel", "block_gradient_kernel")
        assert ("mma" in compiled.asm["ptx"]) == (multiplies and arguments["x"].dtype != torch.float32), told


FIRST, OTHERS = slice(1), slice(1, None)
QUICK = [
    ((1024, 1024), 4096, torch.bfloat16, 1, FIRST, 90),  # both passes in one launch
    ((768, 3072), 256, torch.float16, 1, FIRST, 80),  # stacked blocks, sizes that are no powers of two
    ((4096, 4096), 1, torch.bfloat16, 1, OTHERS, 90),  # few tokens
    ((100, 130), 40, torch.float32, 1, OTHERS, 80),
]
SHAPES = [
    ((768, 768), 1),
    ((768, 2304), 1),
    ((768, 3072), 1),
    ((3072, 768), 1),
    ((384, 1536), 1),
    ((1024, 1024), 1),
    ((1024, 4096), 1),
    ((4096, 1024), 1),
    ((2048, 2048), 1),
    ((2048, 8192), 1),
    ((8192, 2048), 1),
    ((4096, 4096), 1),
    ((8192, 8192), 1),
    ((4096, 11008), 1),
    ((11008, 4096), 1),
    ((100, 100), 1),
    ((130, 70), 1),
    ((1024, 1024), 2),
    ((1024, 1024), 4),
    ((2048, 2048), 8),
    ((1024, 1024), 16),
    ((4096, 4096), 32),
]


@pytest.mark.parametrize(("shape", "tokens", "dtype", "block", "chosen", "capability"), QUICK, ids=str)
def test_launches_compile(shape, tokens, dtype, block, chosen, capability, monkeypatch, tmp_path):
    assert_fits(record(shape, tokens, dtype, monkeypatch, block, chosen), capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_every_launch_compiles(shape, block, dtype, capability, monkeypatch, tmp_path):
    for tokens in (1, 256, 4096):
        assert_fits(record(shape, tokens, dtype, monkeypatch, block), capability, tmp_path)


def test_the_recorded_blocks_are_those_of_the_merge(monkeypatch):
    from spmconvert.operator.merged import merge_stages
    from tests.operator.dense import random_parameters

    for shape in ((96, 96), (128, 512), (512, 128), (64, 88), (130, 70)):
        geometry = Geometry.create(*shape)
        plan = merge_plan(geometry)
        merged = merge_stages(*random_parameters(geometry), plan)
        assert [b.shape for b in empty_blocks(plan, torch.float)] == [b.shape for b in merged]


def test_a_spill_would_be_seen(monkeypatch, tmp_path):
    recorded = record((4096, 4096), 4096, torch.bfloat16, monkeypatch, chosen=FIRST)
    name, grid, arguments, constants, _ = next(x for x in recorded if x[0] == "mix_kernel" and x[3]["PASS"][3] > 1)
    too_large = Tile(16, 32, 64, 64, 4, 1, 160)
    assert Pass(*constants["PASS"]).columns == 64
    launch = (name, grid, arguments, {**constants, "TILE": too_large.sizes}, too_large)
    with pytest.raises(AssertionError):
        assert_fits([launch], 90, tmp_path)
