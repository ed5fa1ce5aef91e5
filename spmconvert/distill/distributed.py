"""Processes and devices of a training run, through accelerate; sharding through PyTorch's own FSDP2.

Accelerate starts the processes' communication, moves nothing by itself and wraps the student for data parallelism.
Sharding calls ``fully_shard`` directly: accelerate offers FSDP2 on accelerators only, and so it is tested on CPUs too.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from spmconvert.distill.state import read_snapshot
from spmconvert.errors import BackendError, OptionError
from spmconvert.recipe.recipe import Training
from spmconvert.system.devices import multiplies_bfloat16

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def settled_precision(training: Training, device: str) -> Training:
    """The numbers of a run with a precision that is named, so that what resumes it elsewhere has the same one.

    Args:
        training: numbers that may leave it to the device.
        device: of the student.
    """
    if training.precision != "auto":
        return training
    return training.model_copy(update={"precision": "bf16" if multiplies_bfloat16(device) else "fp32"})


def make_accelerator(training: Training, device: str, *, shard: bool, tracker: str | None, output: Path) -> Any:
    """The accelerator of a run.

    Args:
        training: settled precision and batch size.
        device: of the student; with several processes each takes the one of its rank.
        shard: whether parameters are to be sharded.
        tracker: name of an experiment tracker, or None.
        output: directory of the run; trackers that write files write beside it.

    Raises:
        OptionError: when the numbers do not fit the processes, or the tracker is not installed.
        BackendError: when the precision is not to be had on the device.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.tracking import get_available_trackers

    if training.precision == "fp16" and (device == "cpu" or shard):
        where = "on a CPU" if device == "cpu" else "with sharded parameters"
        raise BackendError(f"precision fp16 cannot train {where}; use bf16 or fp32")
    known = sorted(str(name.value) for name in get_available_trackers())
    if tracker is not None and tracker not in known:
        raise OptionError(f"tracker {tracker!r} is not installed; installed are: {', '.join(known) or 'none'}")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    # an earlier run in this process may have had another precision, and there is no public way to choose again
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=_PRECISIONS[training.precision],
        log_with=tracker,
        project_dir=f"{output}-runs" if tracker else None,
    )
    processes = accelerator.num_processes
    if training.rows_of_step < processes * training.accumulation:
        raise OptionError(
            f"batch_size is {training.rows_of_step}, {processes} processes with accumulation {training.accumulation} "
            f"need at least {processes * training.accumulation}"
        )
    if shard and processes == 1:
        raise OptionError("sharding needs several processes; use --num-processes, or leave --shard out")
    return accelerator


def share_snapshot(accelerator: Any, file: Path | None) -> dict[str, Any] | None:
    """The snapshot that the first process keeps, for all of them; None where there is none.

    Args:
        accelerator: of the run.
        file: where the first process keeps it; None in all others.
    """
    from accelerate.utils import broadcast_object_list

    content = file.read_bytes() if file is not None and file.exists() and accelerator.num_processes > 1 else None
    if accelerator.num_processes > 1:
        box = [content]
        broadcast_object_list(box)
        return None if box[0] is None else read_snapshot(io.BytesIO(box[0]))
    return read_snapshot(file) if file is not None and file.exists() else None


def prepare_student(
    accelerator: Any, student: Any, *, shard: bool, unused: Callable[[], bool]
) -> tuple[Any, dict[str, nn.Parameter]]:
    """Wrap or shard the student.

    Args:
        accelerator: of the run.
        student: with the trained parameters requiring gradients.
        shard: whether to split it over the processes instead of copying it.
        unused: whether some trained parameters may get no gradient; looking for them costs time in every step.

    Returns:
        What training steps call, and the student's parameters by their own names.
    """
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        whole = set(getattr(student, "_no_split_modules", None) or ())
        for module in student.modules():
            if type(module).__name__ in whole:
                fully_shard(module, mesh=mesh)
        # the output head is used after the model's own forward pass, so the root keeps its parameters until the backward
        fully_shard(student, mesh=mesh, reshard_after_forward=False)
        called = student
    elif accelerator.num_processes > 1:
        from accelerate.utils import DistributedDataParallelKwargs

        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused())
        called = accelerator.prepare(student)
    else:
        called = student
    return called, dict(student.named_parameters())
