"""Logistic regression with an L2 penalty, solved to its optimum: L-BFGS over all rows, several problems at once."""

import math
from collections import deque
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from transferkit.errors import NonFiniteError
from transferkit.linear.design import Design

PAIRS = 12
"""Steps that L-BFGS remembers."""

_NOTHING = 1e-13
"""A fall of the objective that float32 does not show, whatever the weights."""

_PATIENCE = 15
"""Steps in which the predicted fall must halve once."""

_SLOPE_LEFT = 0.3
"""A step is long enough when the slope along it has fallen to this fraction."""


class Loss(Protocol):
    """What the solver asks of a loss. The losses of `training.loss` have it."""

    def total_weight(self, targets: Tensor) -> Tensor | int:
        """Return what the sum is divided by."""

    def sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over rows, `()`: each row adds a part that depends on no other."""

    def each(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row without smoothing and weights, `(N,)`."""


class Problems:
    """Logistic regressions on different rows of one design, solved together.

    Each minimizes `sum of losses / total weight + l2 / 2 * sum of squared weights` over its rows; biases are not
    penalized. All are solved in the same passes over the rows: their logits are one matrix product.

    Args:
        design: The rows.
        targets: int64 `(N,)` or float32 `(N, K)`, on the device of the design.
        loss: Convex in the logits; a function that is not ends where its slope does.
        classes: Number of classes `K`.
        members: Which rows each problem uses, bool `(N, P)`; each has at least one.

    Attributes:
        weights: The solutions, `(P, K, A + 1)`, for the columns of the design, the bias last; zero before `solve`.
        logits: Of all rows in all problems, `(N, P, K)`.

    References:
        Böhning, 1992, "Multinomial logistic regression algorithm": the Hessian is bounded by a multiple of the
        covariance of the features. That preconditions L-BFGS, with a multiple that is measured along each step, so it
        suits any loss.
    """

    def __init__(self, design: Design, targets: Tensor, loss: Loss, *, classes: int, members: Tensor) -> None:
        count, problems = members.shape
        self.design, self.loss = design, loss
        self.targets = targets.repeat_interleave(problems, dim=0)
        weights = [float(loss.total_weight(targets[own])) for own in members.T]  # host sync: once
        self.scale = (members / torch.tensor(weights, device=members.device))[..., None]  # (N, P, 1)
        self.share = self.scale.sum(dim=0).squeeze(1)  # (P,): 1 without class weights
        self.weights = torch.zeros(problems, classes, len(design.axes), device=members.device)
        self.logits = torch.zeros(count, problems, classes, device=members.device)
        self.curvature = torch.ones(problems, device=members.device)
        self._path: deque[tuple[float, Tensor]] = deque(maxlen=2)

    def follow(self, l2: float, *, tolerance: float) -> None:
        """Solve the next penalty of a path from the solutions of the last two, continued in the logarithm of `l2`."""
        if len(self._path) == 2:
            (first, before), (second, weights) = self._path
            self.weights = weights + math.log(l2 / second) / math.log(second / first) * (weights - before)
        self.solve(l2, tolerance=tolerance)
        self._path.append((l2, self.weights))

    def solve(self, l2: float, *, tolerance: float, max_steps: int = 500) -> int:
        """Solve from where the weights are, and return the number of steps.

        Each step takes two passes over the rows, one from a direction to logits and one from slopes to the gradient.
        The line search needs none: logits are linear in the step.

        Args:
            l2: Strength of the penalty.
            tolerance: Error of the weights relative to their norm, as far as the last curvature tells. A problem whose
                slope stops falling, which float32 cannot tell from zero, ends before.
            max_steps: Steps after which it ends anyway.

        Raises:
            NonFiniteError: When the loss gives a slope that is infinite or NaN.
        """
        penalty = torch.full_like(self.weights[0, 0], l2)
        penalty[-1] = 0
        self.logits = self._logits(self.weights)
        slopes = self._slopes(self.logits)
        gradient = self._gradient(slopes) + penalty * self.weights
        pairs = deque([(torch.zeros_like(gradient), torch.zeros_like(gradient))], maxlen=PAIRS)
        mark = torch.full_like(self.curvature, torch.inf)  # the last fall that was half of the one before
        stale = torch.zeros_like(mark)
        for steps in range(max_steps):
            direction = self._direction(gradient, pairs, l2)
            slope = (gradient * direction).sum(dim=(1, 2))
            if not bool(slope.isfinite().all()):  # host sync
                raise NonFiniteError(
                    "the gradient of the loss is not finite: expected a loss that is finite for every logit."
                )
            halved = -slope < 0.5 * mark
            mark, stale = torch.where(halved, -slope, mark), torch.where(halved, 0, stale + 1)
            enough = (tolerance**2 * penalty * self.weights.square()).sum(dim=(1, 2)) + _NOTHING
            running = (-slope > enough) & (stale < _PATIENCE)
            if not bool(running.any()):  # host sync
                return steps
            direction *= running[:, None, None]
            change = self._logits(direction)
            linear = (penalty * self.weights * direction).sum(dim=(1, 2))
            square = (penalty * direction.square()).sum(dim=(1, 2))
            length, new_slopes = self._search(slopes, change, slope * running, linear, square)
            self._measure_curvature(change, length, new_slopes - slopes, running)
            step = length[:, None, None] * direction
            self.weights = self.weights + step
            self.logits = self.logits + length[:, None] * change
            slopes, before = new_slopes, gradient
            gradient = self._gradient(slopes) + penalty * self.weights
            bend = gradient - before
            size = step.flatten(1).norm(dim=1) * ((step * bend).sum(dim=(1, 2)) > 0)
            inverse = torch.where(size > 0, 1 / size, 0.0)[:, None, None]
            pairs.append((inverse * step, inverse * bend))
        return max_steps

    def _logits(self, weights: Tensor) -> Tensor:
        return self.design.logits(weights.flatten(0, 1)).view(self.logits.shape)

    def _gradient(self, slopes: Tensor) -> Tensor:
        return self.design.gradient(slopes.flatten(1)).view(self.weights.shape)

    def _slopes(self, logits: Tensor) -> Tensor:
        """Return the slope of each problem's mean loss in each logit, `(N, P, K)`; 0 in rows that are no members."""
        with torch.enable_grad():
            leaf = logits.detach().flatten(0, 1).requires_grad_()
            (slopes,) = torch.autograd.grad(self.loss.sum(leaf, self.targets), leaf)
        return slopes.view(logits.shape) * self.scale

    def _direction(self, gradient: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], l2: float) -> Tensor:
        """Return the L-BFGS direction of each problem, `(P, K, A + 1)`, from steps and what they did to the gradient.

        The two loops over the pairs are two triangular systems, so a direction takes few passes over them.
        """
        steps, bends = (torch.stack(vectors, dim=1).flatten(2) for vectors in zip(*pairs, strict=True))  # (P, pairs, .)
        products = (steps @ bends.mT).triu()
        diagonal = products.diagonal(dim1=1, dim2=2)
        diagonal += diagonal == 0  # of a problem that has not moved
        downhill = -gradient.flatten(1)[..., None]
        first = torch.linalg.solve_triangular(products, steps @ downhill, upper=True)
        direction = (downhill - bends.mT @ first).view(gradient.shape)
        direction = self.design.precondition(direction, self.curvature * self.share, l2).flatten(1)[..., None]
        known = diagonal[..., None] * first - bends @ direction
        direction += steps.mT @ torch.linalg.solve_triangular(products.mT, known, upper=False)
        return direction.view(gradient.shape)

    def _search(
        self, slopes: Tensor, change: Tensor, start: Tensor, linear: Tensor, square: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the length of each problem's step `(P,)` and the slopes there.

        Looks for a root of the slope along the step, which rises: by secants, kept between the nearest points on its
        two sides. Slopes, not losses: near the optimum float32 losses no longer differ.
        """
        length = torch.ones_like(start)
        low, high = torch.zeros_like(start), torch.full_like(start, torch.inf)
        at_low, at_high = start, torch.full_like(start, torch.inf)
        for left in reversed(range(12)):
            slopes = self._slopes(self.logits + length[:, None] * change)
            here = (slopes * change).sum(dim=(0, 2)) + linear + length * square
            open_ = here.abs() > _SLOPE_LEFT * start.abs()
            if left == 0 or not bool(open_.any()):  # host sync
                break  # with the slopes at this length
            below = here < 0
            secant = length - here * (length - low) / (here - at_low)  # of the last two, where no upper bound is known
            grown = torch.where(secant > length, secant, torch.inf).clamp(1.5 * length, 10 * length)
            low, at_low = torch.where(below, length, low), torch.where(below, here, at_low)
            high, at_high = torch.where(below, high, length), torch.where(below, at_high, here)
            width = high - low
            inside = (low - at_low * width / (at_high - at_low)).clamp(low + 0.1 * width, high - 0.1 * width)
            length = torch.where(open_, torch.where(high.isfinite(), inside, grown), length)
        return length, slopes

    def _measure_curvature(self, change: Tensor, length: Tensor, bend: Tensor, running: Tensor) -> None:
        """Measure the loss's mean curvature in the logits along the last step."""
        rise = (bend * change).sum(dim=(0, 2))
        size = length * (self.scale * change.square()).sum(dim=(0, 2))
        measured = rise / size
        usable = running & measured.isfinite() & (measured > 0)
        self.curvature = torch.where(usable, measured.clamp_min(1e-8), self.curvature)
