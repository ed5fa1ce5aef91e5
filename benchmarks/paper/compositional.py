"""Labels from a teacher network whose matrix is a product of pairwise stages, and from two where it is not.

Student and teacher are the same network, x -> relu(M x) -> head -> class; only what M is differs. ``pairwise``: an SPM
matrix with the student's own pairings, which is the best case there is for SPM. ``shuffled``: the same with the inputs
permuted at random before, so the structure is there but in an order that the student is not told. ``dense``: a Gaussian
matrix, the negative control. Inputs are Gaussian. There is a fixed number of rows to train on, since what is compared
is how far a structure generalises. The teacher's logits are centred and scaled per class, so that classes are about
equally many.

Two mixing layers in teacher and student did not favour SPM either: at width 256, with 32 rows a coordinate, 1000 steps
and one seed, it reached an accuracy of 0.41 on the pairwise teacher at the best of three rates, dense 0.45.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.paper.structures import DENSE, GENERAL, LINEARS, MakeLinear
from benchmarks.paper.training import Task, random_rows

HELD_OUT = 4096


@dataclass(frozen=True)
class Compositional:
    """Settings of the experiment.

    Attributes:
        teachers: pairs of pairwise, shuffled or dense and how many rows to train on, a coordinate of the width.
        classes: number of classes.
        batch_size: rows a step.
    """

    teachers: list[tuple[str, int]]
    classes: int
    batch_size: int
    measure: str = "accuracy"

    def tasks(self, width: int, seed: int) -> Iterator[Task]:
        """One task a teacher; the seed makes the teacher and the rows."""
        for teacher, rows in self.teachers:
            torch.manual_seed(seed)
            sizes = [rows * width, HELD_OUT, HELD_OUT]
            inputs = torch.randn(sum(sizes), width)
            labels = label(inputs, teacher, self.classes)
            trained, validation, test = zip(inputs.split(sizes), labels.split(sizes), strict=True)
            batch = partial(random_rows, trained, self.batch_size)
            name = f"{teacher} teacher, {rows} rows a coordinate"
            yield Task(name, partial(perceptron, width, self.classes), batch, validation, test)


def perceptron(width: int, classes: int, hidden: int, linear: MakeLinear) -> nn.Sequential:
    """One layer of the structure, a ReLU, and a dense head."""
    return nn.Sequential(linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))


@torch.no_grad()
def label(inputs: Tensor, teacher: str, classes: int) -> Tensor:
    """Classes [rows] of inputs [rows, width] by a random teacher."""
    width = inputs.shape[1]
    network = perceptron(width, classes, width, LINEARS[DENSE if teacher == "dense" else GENERAL])
    if teacher == "shuffled":
        inputs = inputs[:, torch.randperm(width)]
    logits = network(inputs)
    return ((logits - logits.mean(0)) / logits.std(0)).argmax(1)
