"""The two models of a finetune: the converted student in float32, and its dense teacher, both as they run for a user.

The student is not in training mode: dropout is not all that models do there. Wav2Vec2 masks spans of a sound, DINOv3 moves
positions, batch norms take the numbers of the batch, BigBird attends at random; the teacher does none of it.
"""

from typing import Any

import torch
from torch import nn

from spmconvert.checkpoint.converted import Converted
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.errors import OptionError
from spmconvert.model.architecture import load_config
from spmconvert.model.loading import load, load_whole
from spmconvert.recipe.recipe import Training


def load_student(converted: Converted, training: Training, device: torch.device) -> Any:
    """The converted model that is trained: float32, dropout off, recomputing or compiled as the numbers of the run say.

    Raises:
        OptionError: when gradient checkpointing is asked for and the architecture has none.
    """
    config = load_config(converted.directory)
    # off as in the teacher, also in blocks that are in training mode for being recomputed
    turn_dropout_off_(config)
    student = load(converted.directory, config=config, dtype=torch.float32).to(device).eval()
    for module in student.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    if training.gradient_checkpointing:
        if not student.supports_gradient_checkpointing:
            raise OptionError(f"{type(student).__name__} has no gradient checkpointing; leave it out")
        # transformers 5.23 calls it activation checkpointing
        name = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
        getattr(student, f"{name}_checkpointing_enable")({"use_reentrant": False})
        # blocks, and stacks of them, that are recomputed in training mode alone; what is inside of them stays as it is
        for module in student.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
    if training.compile:
        student.base_model.forward = torch.compile(student.base_model.forward)
    return student


def turn_dropout_off_(config: Any) -> None:
    """Set every share of dropout to zero, in place, in the configs of towers inside of it, too."""
    from transformers import PreTrainedConfig

    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            turn_dropout_off_(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def load_teacher(source: Checkpoint, config: Any, device: torch.device | str) -> Any:
    """The dense source in float32, in eval and without gradients."""
    teacher = load_whole(source.directory, config, dtype=torch.float32)
    return teacher.to(device).eval().requires_grad_(False)
