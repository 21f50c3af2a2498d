"""Logistic regression with an L2 penalty, solved to its optimum: L-BFGS over all rows, several problems at once."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from transferkit.errors import NonFiniteError
from transferkit.linear.design import Design

PAIRS = 12  # steps that L-BFGS remembers

_NOTHING = 1e-13  # a fall of the objective that float32 does not show, whatever the weights
_ROWS_PER_FEATURE = 2  # so many rows in memory for each feature tell how the losses of all rows curve

_PATIENCE, _PATIENCE_SAMPLED = 15, 8
"""Steps in which the predicted fall must halve once; where a sample has the curvature, it halves in most."""

_SLOPE_LEFT, _SLOPE_LEFT_READING = 0.3, 0.6
"""A step is long enough when the slope along it has fallen to this fraction: another length costs a reading."""


class Loss(Protocol):
    """What the solver asks of a loss. The losses of `training.loss` have it."""

    def total_weight(self, targets: Tensor) -> Tensor | int:
        """Return what the sum is divided by."""

    def sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over rows, `()`: each row adds a part that depends on no other."""

    def each(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row without smoothing and weights, `(N,)`."""


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, estimate: Callable[[Tensor], Tensor], *, most: int = 50
) -> Tensor:
    """Solve `product(x) = right` of each problem, `(P, K, A + 1)`; `estimate` is nearly the inverse of `product`.

    Ends when the residual is 0.01 of the first, as `estimate` measures it.
    """
    left, guess = right, estimate(right)
    solution, direction = torch.zeros_like(right), guess
    size = first = (left * guess).sum(dim=(1, 2), keepdim=True)
    for _ in range(most):
        if not bool((size > 1e-4 * first).any()):  # host sync
            break
        bends = product(direction)
        length = (size / (direction * bends).sum(dim=(1, 2), keepdim=True)).nan_to_num(0, 0, 0)
        solution, left = solution + length * direction, left - length * bends
        guess = estimate(left)
        size, before = (left * guess).sum(dim=(1, 2), keepdim=True), size
        direction = guess + (size / before).nan_to_num(0, 0, 0) * direction
    return solution


class Problems:
    """Logistic regressions on different rows of one design, solved together.

    Each minimizes `sum of losses / total weight + l2 / 2 * sum of squared weights` over its rows; biases are not
    penalized. All are solved in the same passes over the rows: their logits are one matrix product.

    Targets are int64 `(N,)` or float32 `(N, K)`, on the device of the design. The loss is convex in the logits; a
    function that is not ends where its slope does. `members`, bool `(N, P)`, are the rows that each problem uses, one
    or more. With `every`, the rows are all of the table and not those that the design has in memory. Each step then
    reads the table, as a rule once.

    References:
        Böhning, 1992, "Multinomial logistic regression algorithm": the Hessian is bounded by a multiple of the
        covariance of the features. That preconditions L-BFGS, with a multiple that is measured along each step, so it
        suits any loss.
    """

    def __init__(
        self, design: Design, targets: Tensor, loss: Loss, *, classes: int, members: Tensor, every: bool = False
    ) -> None:
        count, problems = members.shape
        self.design, self.loss, self.every = design, loss, every
        self.sampled = every and len(design.rows) >= _ROWS_PER_FEATURE * len(design.axes)
        self.targets = targets[:, None].expand(-1, problems, *targets.shape[1:])
        weights = [float(loss.total_weight(targets[own])) for own in members.T]  # host sync: once
        self.scale = (members / torch.tensor(weights, device=members.device))[..., None]  # (N, P, 1)
        self.share = self.scale.sum(dim=0).squeeze(1)  # (P,): 1 without class weights
        # the solutions for the columns of the design, the bias last, and the logits of all rows
        self.weights = torch.zeros(problems, classes, len(design.axes), device=members.device)  # (P, K, A + 1)
        self.logits = torch.zeros(count, problems, classes, device=members.device)  # (N, P, K)
        self.curvature = torch.ones(problems, device=members.device)
        self.length = torch.ones(problems, device=members.device)  # of steps that a sample suggests
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

        Each step takes one pass over the rows: each block goes from a direction to logits, and from their slopes at
        the step's end to the gradient there. Where that is not a good length, the line search needs no pass, as logits
        are linear in the step, and the gradient one more.

        `tolerance` is the error of the weights relative to their norm, as far as the last curvature tells. A problem
        whose slope stops falling, which float32 cannot tell from zero, ends before. A slope that is infinite or NaN is
        a `NonFiniteError`.
        """
        penalty = torch.full_like(self.weights[0, 0], l2)
        penalty[-1] = 0
        self.logits = torch.zeros_like(self.logits)
        self.logits, slopes, mean = self._follow(self.weights)
        gradient = (self._gradient(slopes) if mean is None else mean) + penalty * self.weights
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
            running = (-slope > enough) & (stale < (_PATIENCE_SAMPLED if self.sampled else _PATIENCE))
            if not bool(running.any()):  # host sync
                return steps
            direction *= running[:, None, None]
            change, new_slopes, mean = self._follow(direction)
            linear = (penalty * self.weights * direction).sum(dim=(1, 2))
            square = (penalty * direction.square()).sum(dim=(1, 2))
            length, end = self._search(new_slopes, change, slope * running, linear, square)
            if mean is None or end is not new_slopes:
                new_slopes, mean = end, self._gradient(end)
            self._measure_curvature(change, length, new_slopes - slopes, running)
            self.length = torch.where(running, (self.length * length).clamp(0.01, 1), self.length)
            step = length[:, None, None] * direction
            self.weights = self.weights + step
            self.logits = self.logits + length[:, None] * change
            slopes, before = new_slopes, gradient
            gradient = mean + penalty * self.weights
            bend = gradient - before
            size = step.flatten(1).norm(dim=1) * ((step * bend).sum(dim=(1, 2)) > 0)
            inverse = torch.where(size > 0, 1 / size, 0.0)[:, None, None]
            pairs.append((inverse * step, inverse * bend))
        return max_steps

    def _follow(self, direction: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return how a step changes the logits, and the slopes and the gradient of the mean losses at its end.

        The gradient only where that saves a reading: with rows in memory the search may well end elsewhere.
        """
        changes, slopes, gradient = [], [], None
        for rows, block in self.design.blocks(every=self.every):
            changes.append((block @ direction.flatten(0, 1).T).view(len(block), *direction.shape[:2]))
            slopes.append(self._slopes(self.logits[rows] + changes[-1], rows))
            if self.every:
                own = (slopes[-1].flatten(1).T @ block).view(direction.shape)
                gradient = own if gradient is None else gradient + own
        return torch.cat(changes), torch.cat(slopes), gradient

    def _gradient(self, slopes: Tensor) -> Tensor:
        """Return the gradient of the mean losses `(P, K, A + 1)`."""
        gradient = torch.zeros(())
        for rows, block in self.design.blocks(every=self.every):
            gradient = gradient.to(block) + slopes[rows].flatten(1).T @ block
        return gradient.view(self.weights.shape)

    def _slopes(self, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return the slope of each problem's mean loss in each logit, `(N, P, K)`; 0 in rows that are no members."""
        with torch.enable_grad():
            leaf = logits.detach().flatten(0, 1).requires_grad_()
            (slopes,) = torch.autograd.grad(self.loss.sum(leaf, self.targets[rows].flatten(0, 1)), leaf)
        return slopes.view(logits.shape) * self.scale[rows]

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
        direction = self._solve_model(direction, l2).flatten(1)[..., None]
        known = diagonal[..., None] * first - bends @ direction
        direction += steps.mT @ torch.linalg.solve_triangular(products.mT, known, upper=False)
        return direction.view(gradient.shape)

    def _solve_model(self, gradient: Tensor, l2: float) -> Tensor:
        """Return the gradients divided by an estimate of the Hessians.

        Where enough rows are in memory, that of all is the one of these, where the weights are: by conjugate gradients.
        """

        def estimate(vector: Tensor) -> Tensor:
            return self.design.precondition(vector, self.curvature * self.share, l2)

        if not self.sampled:
            return estimate(gradient)
        own, rows = self.design.sample, self.design.rows
        scale = self.scale[own] * (self.share / self.scale[own].sum(dim=0).squeeze(1))[:, None]
        penalty = torch.full_like(gradient[0, 0], l2)
        penalty[-1] = 1e-4  # softmax has no curvature along equal biases
        with torch.enable_grad():
            leaf = self.logits[own].flatten(0, 1).requires_grad_()
            total = self.loss.sum(leaf, self.targets[own].flatten(0, 1))
            (slopes,) = torch.autograd.grad(total, leaf, create_graph=True)
        if not slopes.requires_grad:  # a loss of straight pieces
            return estimate(gradient)

        def bend(direction: Tensor) -> Tensor:
            change = (rows @ direction.flatten(0, 1).T).view(-1, gradient.shape[1])
            (bends,) = torch.autograd.grad(slopes, leaf, change, retain_graph=True)
            bends = bends.view(len(own), *gradient.shape[:2]) * scale
            return (bends.flatten(1).T @ rows).view(gradient.shape) + penalty * direction

        return self.length[:, None, None] * conjugate_gradients(bend, gradient, estimate)

    def _search(
        self, slopes: Tensor, change: Tensor, start: Tensor, linear: Tensor, square: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the length of each problem's step `(P,)` and the slopes there, given the slopes at length 1.

        Looks for a root of the slope along the step, which rises: by secants, kept between the nearest points on its
        two sides. Slopes, not losses: near the optimum float32 losses no longer differ.
        """
        length = torch.ones_like(start)
        low, high = torch.zeros_like(start), torch.full_like(start, torch.inf)
        at_low, at_high = start, torch.full_like(start, torch.inf)
        for left in reversed(range(12)):
            here = (slopes * change).sum(dim=(0, 2)) + linear + length * square
            open_ = here.abs() > (_SLOPE_LEFT_READING if self.every else _SLOPE_LEFT) * start.abs()
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
            slopes = self._slopes(self.logits + length[:, None] * change)
        return length, slopes

    def _measure_curvature(self, change: Tensor, length: Tensor, bend: Tensor, running: Tensor) -> None:
        """Measure the loss's mean curvature in the logits along the last step."""
        rise = (bend * change).sum(dim=(0, 2))
        size = length * (self.scale * change.square()).sum(dim=(0, 2))
        measured = rise / size
        usable = running & measured.isfinite() & (measured > 0)
        self.curvature = torch.where(usable, measured.clamp_min(1e-8), self.curvature)
