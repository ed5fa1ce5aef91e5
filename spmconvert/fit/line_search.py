"""A line search that asks for its evaluations, so that those of many layers are made together.

It is the search of ``torch.optim.LBFGS``: step sizes grow by cubic extrapolation until two of them enclose a point that
meets the strong Wolfe conditions, then cubic interpolation narrows that bracket down. Here it is a generator: it yields a
step size and is sent the loss and the slope there, as plain numbers, so every layer has a course of its own while a device
only ever sees evaluations of all of them. It ends at the step size that it evaluated last; where torch goes back to an
earlier one that is evaluated once more, so that whoever evaluates needs to keep no gradients.
"""

import math
from collections.abc import Generator
from typing import NamedTuple

# shares of the first slope: what the loss has to fall by at least, and what the slope may be at most
ARMIJO, CURVATURE = 1e-4, 0.9
# evaluations, and the largest change of an unknown that a bracket is narrowed down to
MOST_TRIES, LEAST_MOVE = 25, 1e-9
# least and most of a step's growth, and how near to an end of the bracket a trial may be twice
LEAST_GROWTH, MOST_GROWTH, MARGIN = 0.01, 10, 0.1

Trials = Generator[float, tuple[float, float], int]


class Point(NamedTuple):
    """A point on the line.

    Attributes:
        step: where it is.
        loss: there.
        slope: of the loss along the line.
    """

    step: float
    loss: float
    slope: float


def strong_wolfe(start: Point, step: float, reach: float) -> Trials:
    """Search from a start at step size zero; returns the number of evaluations that torch would have made.

    Args:
        start: loss and slope, which is negative, at zero.
        step: the first step size.
        reach: largest change of an unknown for a step of size one.
    """
    search = _Search(start, reach)
    yield from search.bracket(step)
    if not search.is_met and search.tries < MOST_TRIES:
        yield from search.zoom()
    evaluations = search.evaluations
    # what nobody can know without another evaluation
    if search.low.step != search.latest.step:
        yield search.low.step
    return evaluations


class _Search:
    """What is known along one line.

    Attributes:
        ends: of the bracket, the first two points that were taken into it.
        latest: point that was evaluated last.
        is_met: whether that meets the conditions.
        tries: evaluations after the first.
    """

    def __init__(self, start: Point, reach: float) -> None:
        self.start, self.latest, self.reach = start, start, reach
        self.ends = [start, start]
        self.is_met = False
        self.evaluations = 0

    @property
    def tries(self) -> int:
        return max(0, self.evaluations - 1)

    @property
    def low(self) -> Point:
        """The better end of the bracket, or the point that meets the conditions."""
        return self.latest if self.is_met else self.ends[self._low_end]

    @property
    def _low_end(self) -> int:
        return 0 if self.ends[0].loss <= self.ends[1].loss else 1

    def _evaluate(self, step: float) -> Generator[float, tuple[float, float], Point]:
        loss, slope = yield step
        self.evaluations += 1
        self.latest = Point(step, loss, slope)
        return self.latest

    def _falls_too_little(self, point: Point) -> bool:
        return point.loss > self.start.loss + ARMIJO * point.step * self.start.slope

    def _is_flat(self, point: Point) -> bool:
        return abs(point.slope) <= -CURVATURE * self.start.slope

    def bracket(self, step: float) -> Generator[float, tuple[float, float], None]:
        """Lengthen the step until a point meets the conditions or two enclose one that does."""
        before = self.start
        point = yield from self._evaluate(step)
        while self.tries < MOST_TRIES:
            if self._falls_too_little(point) or (self.tries > 1 and point.loss >= before.loss):
                self.ends = [before, point]
                return
            if self._is_flat(point):
                self.is_met = True
                return
            if point.slope >= 0:
                self.ends = [before, point]
                return
            least = point.step + LEAST_GROWTH * (point.step - before.step)
            longer = cubic_minimum(before, point, least, MOST_GROWTH * point.step)
            before, point = point, (yield from self._evaluate(longer))
        self.ends = [self.start, point]

    def zoom(self) -> Generator[float, tuple[float, float], None]:
        """Narrow the bracket down until a point meets the conditions."""
        low, was_near_end = self._low_end, False
        while not self.is_met and self.tries < MOST_TRIES:
            ends = self.ends
            if abs(ends[1].step - ends[0].step) * self.reach < LEAST_MOVE:
                return
            step, was_near_end = _trial(ends, was_near_end)
            point = yield from self._evaluate(step)
            if self._falls_too_little(point) or point.loss >= ends[low].loss:
                ends[1 - low] = point
                low = self._low_end
                continue
            if self._is_flat(point):
                self.is_met = True
            elif point.slope * (ends[1 - low].step - ends[low].step) >= 0:
                ends[1 - low] = ends[low]
            ends[low] = point


def _trial(ends: list[Point], was_near_end: bool) -> tuple[float, bool]:
    """A step size inside of the bracket, and whether it is near an end; not twice in a row."""
    least, most = sorted(end.step for end in ends)
    step = cubic_minimum(ends[0], ends[1], least, most)
    margin = MARGIN * (most - least)
    if not min(most - step, step - least) < margin:
        return step, False
    if was_near_end or step >= most or step <= least:
        return (most - margin if abs(step - most) < abs(step - least) else least + margin), False
    return step, True


def cubic_minimum(first: Point, second: Point, least: float, most: float) -> float:
    """Where the cubic through two points and their slopes is least, kept between two step sizes; else their middle."""
    left, right = (first, second) if first.step <= second.step else (second, first)
    width = right.step - left.step
    if width == 0:
        return (least + most) / 2
    mixed = left.slope + right.slope - 3 * (right.loss - left.loss) / width
    square = mixed * mixed - left.slope * right.slope
    if not square >= 0:
        return (least + most) / 2
    root = math.sqrt(square)
    divisor = right.slope - left.slope + 2 * root
    if divisor == 0:
        return (least + most) / 2
    return min(max(right.step - width * ((right.slope + root - mixed) / divisor), least), most)
