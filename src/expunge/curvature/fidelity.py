r"""Subset fidelity (ModHiFi): how well some inputs of a layer, rescaled, reproduce its output.

The output c of a layer is a sum of contributions \(Y_c = \sum_i A_{ci}\), one an input channel (bias
left out). With the Gram matrix \(G^c_{ij} = E\langle A_{ci}, A_{cj}\rangle\), \(b = G^c 1\) and
\(\|Y_c\|^2 = 1^T G^c 1\), the fidelity of a subset C is

\[
FS_c(C) = \max_\delta \Big[1 - \frac{E\|Y_c - \sum_{i \in C} \delta_i A_{ci}\|^2}{E\|Y_c\|^2}\Big]
        = \frac{b_C^T \delta^*}{1^T G^c 1}, \qquad \delta^* = (G^c_{CC})^{-1} b_C ,
\]

and for one input \(s_{ci} = b_i^2 / (G^c_{ii}\, 1^T G^c 1)\). Everything follows from one uncentred
moment matrix of what the layer reads (\(x x^T\), or of patches for a convolution), so that one
stream of forward passes is enough: no gradient, no loss, no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError, ModelError, NeedsError, SettingError

Score = Literal["energy", "mean", "max"]
Counted = Callable[[Batch], Tensor]

DEAD = 1e-12
"""Energies below this share of those beside them count as none."""


@dataclass(frozen=True)
class Contributions:
    r"""What each input of one layer contributes to each output, over some samples.

    Attributes:
        weight: \(W\) [C_out, C_in, K], K = 1 for a linear layer, else the kernel's size.
        moment: summed moments [C_in·K, C_in·K] of what the layer reads, float64.
        samples: samples (tokens, positions) behind the moments.
    """

    weight: Tensor
    moment: Tensor
    samples: int

    def joined(self, other: Contributions) -> Contributions:
        """The contributions over both sets of samples; the layer is the same."""
        return Contributions(self.weight, self.moment + other.moment, self.samples + other.samples)

    def grouped(self, size: int) -> Contributions:
        """The contributions of groups of neighbouring inputs, such as attention heads.

        Args:
            size: inputs of each group.

        Raises:
            SettingError: the layer is none of single inputs that groups of this size make up.
        """
        outputs, inputs, kernel = self.weight.shape
        if kernel != 1 or size < 1 or inputs % size:
            raise SettingError(f"{inputs} inputs of a kernel of {kernel} make no groups of {size}")
        return Contributions(self.weight.reshape(outputs, -1, size), self.moment, self.samples)

    def gram(self, output: int) -> Tensor:
        r"""Gram matrix \(G^c\) [C_in, C_in] of one output, summed over the samples."""
        w = self.weight[output].double()
        inputs, size = w.shape
        return torch.einsum("ik,ikjl,jl->ij", w, self.moment.view(inputs, size, inputs, size), w)

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Of all outputs: \(b\) [C_out, C_in], the diagonals of G [C_out, C_in], energies [C_out]."""
        w = self.weight.double()
        outputs, inputs, size = w.shape
        b = ((w.reshape(outputs, -1) @ self.moment).reshape(w.shape) * w).sum(2)
        blocks = self.moment.view(inputs, size, inputs, size)
        own = torch.stack([blocks[i, :, i] for i in range(inputs)])
        return b, torch.einsum("cik,ikl,cil->ci", w, own, w), b.sum(1)

    def singleton(self) -> Tensor:
        r"""Fidelity \(s_{ci}\) [C_out, C_in] of each input alone, 0 … 1; dead outputs have 0."""
        b, own, energy = self.products()
        live = (own > DEAD * own.amax(1, keepdim=True)) & self.live()[:, None]
        s = torch.where(live, b.square() / (own * energy[:, None]), 0.0)
        return s.clamp(0, 1)

    def live(self) -> Tensor:
        """Outputs [C_out] with any energy, next to that of their contributions."""
        _, own, energy = self.products()
        return energy > DEAD * own.sum(1)

    def channels(self, score: Score = "energy") -> Tensor:
        r"""One score [C_in] an input, over all live outputs.

        `energy`: \(\sum_c E\|Y_c\|^2 s_{ci} / \sum_c E\|Y_c\|^2\); or the plain `mean`, or `max`.
        """
        s, energy, live = self.singleton(), self.products()[2], self.live()
        if not bool(live.any()):
            return s.new_zeros(s.shape[1])
        if score == "energy":
            return (s * energy[:, None])[live].sum(0) / energy[live].sum()
        return s[live].mean(0) if score == "mean" else s[live].amax(0)

    def fidelity(self, output: int, subset: Tensor) -> tuple[float, Tensor]:
        r"""Fidelity of a subset for one output, and the scales that reach it.

        Args:
            output: c.
            subset: positions [k] of inputs.

        Returns:
            \(FS_c\) in 0 … 1 and δ* [k]. Of the scales that are best, those nearest to 1: inputs that
            are dead or always move together leave a choice. A dead output has fidelity 1 and scales 1.
        """
        gram = self.gram(output)
        energy, b = gram.sum(), gram.sum(1)[subset]
        ones = torch.ones(len(subset), dtype=torch.float64, device=gram.device)
        if float(energy) <= DEAD * float(gram.diagonal().sum()):
            return 1.0, ones
        part = gram[subset][:, subset]
        # by eigenvalues, since inputs that move together make G singular
        solve = torch.linalg.pinv(part, hermitian=True, rtol=1e-10)
        scales = ones + solve @ (b - part @ ones)
        return min(1.0, max(0.0, float(b @ scales / energy))), scales


def contributions(
    model: nn.Module,
    layer: str,
    batches: Iterable[Batch],
    forward: Callable[[Batch], Any],
    counted: Counted | None = None,
) -> Contributions:
    """Run samples through the model and sum the moments of what one layer reads.

    Args:
        model: in eval mode.
        layer: name of a linear or ungrouped 2-D convolution layer; further dimensions of a linear
            layer's input (tokens) count as samples.
        batches: read once.
        forward: runs the model on a batch.
        counted: which of a batch's tokens [B, T] count, where some are padding; all if left out.

    Returns:
        The contributions; the weight in it is as it was before the passes.

    Raises:
        NeedsError: the layer is of another kind.
        ModelError: the layer does not exist, or is not run.
        ExpungeError: what it reads is not finite.
    """
    return contributions_of(model, [layer], batches, forward, counted)[layer]


def contributions_of(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Batch],
    forward: Callable[[Batch], Any],
    counted: Counted | None = None,
) -> dict[str, Contributions]:
    """The same of several layers by one stream of passes; takes and raises what `contributions` does.

    Each layer holds a matrix [C_in·K, C_in·K] in float64 meanwhile.
    """
    known = dict(model.named_modules())
    for layer in layers:
        if layer not in known:
            raise ModelError(f"the model has no layer {layer!r}")
    weights = {layer: split_weight(layer, known[layer]) for layer in layers}
    sizes = {layer: w.shape[1] * w.shape[2] for layer, w in weights.items()}
    moments = {
        layer: torch.zeros(n, n, dtype=torch.float64, device=weights[layer].device)
        for layer, n in sizes.items()
    }
    seen = dict.fromkeys(layers, 0)
    mask: Tensor | None = None

    def reader(layer: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(module: nn.Module, given: tuple[Any, ...]) -> None:
            columns = _columns(module, given[0].detach())
            if mask is not None:
                columns = columns[mask.reshape(-1)]
            columns = columns.double()
            moments[layer].addmm_(columns.T, columns)
            seen[layer] += len(columns)

        return read

    handles = [known[layer].register_forward_pre_hook(reader(layer)) for layer in layers]
    try:
        for batch in batches:
            mask = None if counted is None else counted(batch).bool()
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    for layer, moment in moments.items():
        if not seen[layer]:
            raise ModelError(f"layer {layer!r} was not run by the model")
        if not bool(moment.isfinite().all()):
            raise ExpungeError(f"what layer {layer!r} reads is NaN or infinite")
    return {layer: Contributions(weights[layer], moments[layer], seen[layer]) for layer in layers}


def by_output(module: nn.Module) -> Tensor:
    """A layer's weight as [C_out, C_in, …]: a view, so that writing to it edits the layer."""
    assert isinstance(module.weight, Tensor)
    return module.weight.T if _is_transposed(module) else module.weight


def split_weight(layer: str, module: nn.Module) -> Tensor:
    """A copy of a layer's weight as [C_out, C_in, K].

    Raises:
        NeedsError: its output is no sum over input channels of a known form.
    """
    if _is_linear(module):
        return by_output(module).detach()[:, :, None].clone()
    if not isinstance(module, nn.Conv2d):
        what = f"is a {type(module).__name__}"
    elif module.groups != 1:
        what = f"is a Conv2d with {module.groups} groups"
    elif module.padding_mode != "zeros":
        what = f"is a Conv2d with {module.padding_mode} padding"
    else:
        return module.weight.detach().flatten(2).clone()
    raise NeedsError(
        "fidelity is known for linear layers and 2-D convolutions with one group and zero padding; "
        f"{layer!r} {what}"
    )


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, whose weight is [C_in, C_out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _columns(module: nn.Module, x: Tensor) -> Tensor:
    """What each output position reads [n, C_in·K]."""
    if _is_linear(module):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(module, nn.Conv2d)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # unfolding has no half precision
    padding: Any = module.padding
    if isinstance(padding, str):  # "same" may take one more row or column at the end
        spans = zip(module.dilation, module.kernel_size, strict=True)
        whole = [d * (k - 1) if padding == "same" else 0 for d, k in spans]
        (top, bottom), (left, right) = ((w // 2, w - w // 2) for w in whole)
        wide, padding = F.pad(wide, (left, right, top, bottom)), 0
    patches = F.unfold(
        wide,
        module.kernel_size,  # type: ignore[arg-type]
        dilation=module.dilation,  # type: ignore[arg-type]
        padding=padding,
        stride=module.stride,  # type: ignore[arg-type]
    )
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


@torch.no_grad()
def keep_inputs(
    module: nn.Module, found: Contributions, kept: Tensor, compensate: bool = True
) -> None:
    r"""Prune a layer to some of its inputs (ModHiFi-P), in place: the others' weights become 0.

    Kept weights are rescaled, \(W_{ci} \leftarrow \delta^*_{ci} W_{ci}\), with the scales of the kept
    set: without them a selection by fidelity can be worse than a random one.

    Args:
        module: the layer `found` was measured on.
        found: its contributions.
        kept: positions [k] of the inputs that stay.
        compensate: rescale.
    """
    new = torch.zeros_like(found.weight)
    if not compensate:
        new[:, kept] = found.weight[:, kept]
    elif found.weight.shape[2] == 1 and bool(found.weight[:, kept].all()):
        new[:, kept, 0] = _rescaled(found, kept).to(new.dtype)
    else:
        for output in range(len(new)):
            scales = found.fidelity(output, kept)[1][:, None].to(new.dtype)
            new[output, kept] = found.weight[output, kept] * scales
    weight = by_output(module)
    weight.copy_(new.reshape(weight.shape))


def _rescaled(found: Contributions, kept: Tensor) -> Tensor:
    r"""Kept weights [C_out, k] times δ*, of all outputs by one solve instead of one each.

    For a linear layer \(G^c = w_c w_c^T \circ S\), so that \(\delta^* \circ w_{c,K} = S_{KK}^{-1} S_{K:} w_c\),
    where no weight is 0. Of the weights that are best, those nearest to what they were.
    """
    gone = torch.ones(found.weight.shape[1], dtype=torch.bool, device=found.weight.device)
    gone[kept] = False
    weight, moment = found.weight[:, :, 0].double(), found.moment
    solve = torch.linalg.pinv(moment[kept][:, kept], hermitian=True, rtol=1e-10)
    return weight[:, kept] + weight[:, gone] @ moment[gone][:, kept] @ solve
