r"""The `smooth=` choice: forget so that weights near by have forgotten too.

With \(\ell\) the loss that is smoothed, over the whole batch, \(g = \nabla\ell(\theta)\),
\(v = g / \lVert g \rVert\), and norms over all weights that may move together, a step minimises

\[
\begin{aligned}
\texttt{sam}(\rho) &: \max_{\lVert\delta\rVert \le \rho} \ell(\theta + \delta) \approx \ell(\theta + \rho v) &
\texttt{rs}(\sigma, K) &: \tfrac1K \textstyle\sum_k \ell(\theta + \sigma z_k),\ z_k \sim \mathcal N(0, I) \\
\texttt{gp}(\lambda) &: \ell(\theta) + \lambda \lVert g \rVert &
\texttt{cr}(\lambda, \mu) &: \ell(\theta) + \lambda \lVert \nabla\ell(\theta + \mu v) - g \rVert
\end{aligned}
\]

and `swa(START, EVERY)` ends with the mean of the weights after steps START, START + EVERY, … (see
`average.py`). A loss that comes in parts (`Apart`) has the first smoothed and the others taken at θ.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.core.errors import NeedsError, SettingError
from expunge.core.runtime import Runtime
from expunge.train.masks import Mask
from expunge.train.master import HALVES
from expunge.train.norm import norm_layers
from expunge.train.parts import Apart, parts_of, samples_in

if TYPE_CHECKING:
    from expunge.train.fit import Loss

Gradient = dict[str, Tensor]
CHOICES = (
    "none, sam(RHO), rs(SIGMA), rs(SIGMA, K), gp(LAMBDA), cr(LAMBDA), cr(LAMBDA, MU), swa(START) or "
    "swa(START, EVERY)"
)
_SECOND: dict[str, tuple[float, ...]] = {
    "sam": (), "rs": (3,), "gp": (), "cr": (0.01,), "swa": (1,),
}  # fmt: skip
"""Defaults of the second argument, where there is one."""
_TINY = 1e-12


def parse_smooth(spec: str) -> tuple[str, tuple[float, ...]]:
    """Split `name(argument, …)` into the name and its numbers, with defaults filled in.

    Raises:
        SettingError: it is none of the choices, or a number is out of range.
    """
    match = re.fullmatch(r"(none|sam|rs|gp|cr|swa)(?:\(([^()]*)\))?", spec.strip())
    if match is None or (match[1] == "none") != (match[2] is None):
        raise SettingError(f"smooth={spec!r} is not a choice; use {CHOICES}")
    kind, given = match[1], (match[2] or "").split(",")
    if kind == "none":
        return kind, ()
    try:
        first, *others = map(float, given)
    except ValueError:
        first, others = -1.0, []
    values = (first, *(others or _SECOND[kind]))
    counts = {"rs": values[1:], "swa": values}.get(kind, ())
    if (
        len(values) != 1 + len(_SECOND[kind])
        or not all(map(math.isfinite, values))
        or first < 0
        or any(v <= 0 for v in values[1:])
        or any(v % 1 or v < 1 for v in counts)
    ):
        raise SettingError(
            f"smooth={spec!r}: RHO, SIGMA and LAMBDA are numbers from 0, MU one above 0, and K, START and "
            f"EVERY counts from 1, as in {CHOICES}"
        )
    return kind, values


@dataclass
class _Seen:
    """A batch of the step in progress, its samples, and what its loss saw besides the weights."""

    loss: Loss
    batch: Any
    count: int
    random: tuple[Tensor, Tensor | None]
    buffers: dict[str, Tensor]
    training: list[bool]


class Smoother:
    """Takes the gradients of `sam`, `rs`, `gp` and `cr` in place of a plain backward pass.

    The model is not asked through a wrapper for several processes: what is shared between them are
    the gradients of the whole batch, once for each pass.
    """

    def __init__(
        self,
        kind: str,
        values: tuple[float, ...],
        model: nn.Module,
        moving: Mapping[str, nn.Parameter],
        wide: Mapping[str, nn.Parameter],
        barred: Mask | None,
        *,
        runtime: Runtime,
        accumulate: int,
        stage: str,
    ) -> None:
        """Keep what the passes need.

        Args:
            kind: sam, rs, gp or cr.
            values: its numbers, from `parse_smooth`.
            model: the model in training.
            moving: its parameters that may move.
            wide: the same in float32 at least.
            barred: True where a coordinate of these may not move.
            runtime: processes, seeds, precision, cost.
            accumulate: batches a step.
            stage: name of the training, for seeds.

        Raises:
            NeedsError: gradients of gradients are asked for in fp16.
        """
        if kind in ("gp", "cr") and runtime.precision == "fp16":
            raise NeedsError(
                f"smooth={kind} differentiates gradients, which the scaled losses of fp16 do not bear; use "
                "precision bf16 or no, or smooth=sam"
            )
        self.kind, self.values, self.model, self.moving, self.wide, self.barred = (
            kind, values, model, moving, wide, barred,
        )  # fmt: skip
        self.runtime, self.accumulate, self.stage = runtime, accumulate, stage
        self.backward: Callable[[Tensor], Any] = Tensor.backward
        self._norms = norm_layers(model)
        self.begin()

    def begin(self) -> None:
        """Forget the batches of a step that was not finished."""
        self._seen: list[_Seen] = []
        self._parts: list[Tensor] = []
        self._first: Gradient = {}
        self._rest: Gradient = {}
        self._values: list[Tensor] = []

    def loss(self, loss_of: Loss, batch: Any) -> Tensor:
        """The loss of a batch at the weights as they are."""
        cuda = self.runtime.device.startswith("cuda")
        on_device = torch.cuda.get_rng_state(self.runtime.device) if cuda else None
        state = torch.get_rng_state(), on_device
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        modes = [layer.training for layer in self._norms]
        first, count = loss_of, samples_in(batch)
        if isinstance(loss_of, Apart):
            first = loss_of.again or next(iter(loss_of.parts.values()))
            count = samples_in(batch[0])
        self._seen.append(_Seen(first, batch, count, state, buffers, modes))
        self._parts = [part(self.model, batch) for part in parts_of(loss_of)]
        return torch.stack([part.detach() for part in self._parts]).sum()

    def take(self) -> None:
        """Take the gradients of the last loss, those of its parts apart."""
        first, *rest = self._parts
        if self.kind != "rs":  # it has no use for the gradient at the weights themselves
            self._add(first, self._first)
        for part in rest:
            self._add(part, self._rest)
        self._values.append(torch.stack([p.detach() for p in self._parts]))
        self._parts = []

    def finish(self, step: int) -> float:
        """Leave the gradients of the smoothed step in the weights.

        Args:
            step: optimiser steps taken, which seeds the noise of `rs`.

        Returns:
            What was minimised: the smoothed loss, and the rest at the weights.
        """
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        modes = [layer.training for layer in self._norms]
        at_weights = torch.stack(self._values).sum(0) / self.accumulate
        take = {"sam": self._sam, "rs": self._rs, "gp": self._gp, "cr": self._cr}[self.kind]
        try:
            gradient, value, penalty = take(at_weights[0], step)
        finally:
            self._put(buffers, modes)
        total = _sum((1.0, gradient), (1.0, self._whole(self._rest)))
        for name, p in self.moving.items():
            p.grad = total.get(name)
        value = self.runtime.sum(value + at_weights[1:].sum()) / self.runtime.processes
        self.begin()
        return float(value) + float(penalty)

    # Each gives the gradient, the loss it belongs to (of this process), and a penalty (of the whole).

    def _sam(self, value: Tensor, step: int) -> tuple[Gradient, Tensor, float | Tensor]:
        first = self._whole(self._first)
        scale = self.values[0] / (_norm(first) + _TINY)
        with self._moved(first.items(), scale):
            first.clear()
            return *self._again(), 0.0

    def _rs(self, value: Tensor, step: int) -> tuple[Gradient, Tensor, float | Tensor]:
        sigma, draws = self.values[0], int(self.values[1])
        mean: Gradient = {}
        loss = torch.zeros_like(value)
        for draw in range(draws):
            with self._moved(self._noise(step, draw), sigma):
                gradient, one = self._again()
            mean, loss = _sum((1.0, mean), (1 / draws, gradient)), loss + one / draws
        return mean, loss, 0.0

    def _gp(self, value: Tensor, step: int) -> tuple[Gradient, Tensor, float | Tensor]:
        first = self._whole(self._first)
        norm = _norm(first)
        bent = self._curved(_sum((1 / (norm + _TINY), first)))
        return _sum((1.0, first), (self.values[0], bent)), value, self.values[0] * norm

    def _cr(self, value: Tensor, step: int) -> tuple[Gradient, Tensor, float | Tensor]:
        r"""With \(d = \nabla\ell(\theta + \mu v) - g\) and \(w = d / \lVert d \rVert\).

        Its penalty has the gradient \(\nabla \lVert d \rVert = H'w + H(\mu p - w)\), the derivative of
        \(v\) included: \(H\) and \(H'\) are the Hessians at \(\theta\) and \(\theta + \mu v\), and
        \(p = (I - v v^T) H'w / \lVert g \rVert\).
        """
        strength, distance = self.values
        first = self._whole(self._first)
        norm = _norm(first) + _TINY
        along = _sum((1 / norm, first))
        with self._moved(along.items(), distance):
            away, _ = self._again()
            difference = _sum((1.0, away), (-1.0, first))
            size = _norm(difference)
            toward = _sum((1 / (size + _TINY), difference))
            there = self._curved(toward)
        turned = _sum((1 / norm, there), (-_dot(along, there) / norm, along))
        here = self._curved(_sum((distance, turned), (-1.0, toward)))
        total = _sum((1.0, first), (strength, there), (strength, here))
        return total, value, strength * size

    def _again(self) -> tuple[Gradient, Tensor]:
        """Gradient over the whole batch at the weights as they are now, and this process' loss."""
        found: Gradient = {}
        losses = []
        for seen in self._seen:
            with self._as_seen(seen):
                loss = seen.loss(self.model, seen.batch)
                self._add(loss, found)
            losses.append(loss.detach() / self.accumulate)
            self.runtime.cost.gradients += seen.count
        return self._whole(found), torch.stack(losses).sum()

    def _curved(self, direction: Gradient) -> Gradient:
        r"""\(H u\): the Hessian over the whole batch at the weights of now, times a direction."""
        found: Gradient = {}
        for seen in self._seen:
            # fused attention has no second derivative
            with self._as_seen(seen), sdpa_kernel(SDPBackend.MATH), _twice(self.kind):
                loss = seen.loss(self.model, seen.batch)
                if not loss.requires_grad:
                    continue
                gradients = torch.autograd.grad(
                    loss, list(self.moving.values()), create_graph=True, allow_unused=True
                )
                slope = sum(
                    (g * direction[n].to(g.dtype)).sum()
                    for n, g in zip(self.moving, gradients, strict=True)
                    if g is not None and n in direction
                )
                if isinstance(slope, Tensor):
                    self._add(slope, found)
            self.runtime.cost.gradients += 2 * seen.count
        return self._whole(found)

    def _add(self, loss: Tensor, gradient: Gradient) -> None:
        """Add the gradient of a batch's loss, over the batches of a step."""
        if not loss.requires_grad:
            return
        for name, p in self.moving.items():
            p.grad = gradient.get(name)
        self.backward(loss / self.accumulate)
        for name, p in self.moving.items():
            if p.grad is not None:
                gradient[name], p.grad = p.grad, None

    def _whole(self, gradient: Gradient) -> Gradient:
        """Mean of a gradient over processes, 0 where a coordinate may not move; in place."""
        for name, p in self.moving.items():
            if self.runtime.processes > 1:
                shared = gradient.setdefault(name, torch.zeros_like(p))
                gradient[name] = self.runtime.sum(shared.contiguous()) / self.runtime.processes
            if self.barred is not None and name in gradient:
                gradient[name].masked_fill_(self.barred[name], 0.0)
        return gradient

    def _noise(self, step: int, draw: int) -> Iterator[tuple[str, Tensor]]:
        """Normal numbers for each weight that may move: the same in every process and each time."""
        seed = self.runtime.seed_for(self.stage, "noise", step, draw)
        device = next(iter(self.moving.values())).device
        generator = torch.Generator(device).manual_seed(seed)
        for name, p in self.wide.items():
            drawn = torch.randn(p.shape, generator=generator, device=device, dtype=p.dtype)
            if self.barred is not None:
                drawn.masked_fill_(self.barred[name], 0.0)
            yield name, drawn

    @contextlib.contextmanager
    def _moved(
        self, direction: Iterable[tuple[str, Tensor]], scale: float | Tensor
    ) -> Iterator[None]:
        """Have the weights at θ + scale · direction for a while, then as they were to the bit."""
        with kept(self.moving.values()):
            with torch.no_grad():
                for name, shift in direction:
                    wide = self.wide[name]
                    self.moving[name].copy_(wide + shift.to(wide.dtype) * scale)
            yield

    @contextlib.contextmanager
    def _as_seen(self, seen: _Seen) -> Iterator[None]:
        """Let a loss draw the same random numbers and see the same statistics as the first time."""
        state, on_device = seen.random
        with torch.random.fork_rng([self.runtime.device] if on_device is not None else []):
            torch.set_rng_state(state)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self.runtime.device)
            self._put(seen.buffers, seen.training)
            yield

    @torch.no_grad()
    def _put(self, buffers: dict[str, Tensor], modes: list[bool]) -> None:
        for name, buffer in self.model.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])
        for layer, mode in zip(self._norms, modes, strict=True):
            layer.training = mode


@contextlib.contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put tensors back to what they are now, to the bit."""
    pairs = [(t.detach(), t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        for tensor, value in pairs:
            tensor.copy_(value)


@contextlib.contextmanager
def _twice(kind: str) -> Iterator[None]:
    """Say in one sentence that an operation has no second derivative."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not re.search(r"not implemented|differentiate twice|double backward|checkpoint", said):
            raise
        raise NeedsError(
            f"smooth={kind} differentiates gradients, which a layer of this model does not allow "
            f"({said.splitlines()[0]}); use smooth=sam or rs"
        ) from error


def _norm(gradient: Gradient) -> Tensor:
    """Euclidean norm over all tensors together, in float32 at least."""
    return _dot(gradient, gradient).sqrt()


def _dot(a: Gradient, b: Gradient) -> Tensor:
    """Inner product over the tensors that both have."""
    parts = [(_long(a[n]) * _long(b[n])).sum() for n in a if n in b]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _long(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def _sum(*terms: tuple[float | Tensor, Gradient]) -> Gradient:
    """Weighted sum of gradients; a tensor that one of them lacks counts as 0 there."""
    total: Gradient = {}
    for weight, gradient in terms:
        for name, value in gradient.items():
            term = value if isinstance(weight, float) and weight == 1 else value * weight
            total[name] = total[name] + term if name in total else term
    return total
