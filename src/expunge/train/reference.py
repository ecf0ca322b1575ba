"""The original beside a model in training: a second copy, the model with its adapters off, or a cache.

All three give the same numbers. `auto` takes what holds least memory: adapters off where there are
adapters, a cache where only likelihoods of answers are asked for, else a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import SettingError
from expunge.core.hashing import content_key, hash_model, hash_tensors
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.train.adapters import adapters_off, has_adapters

ReferenceName = Literal["auto", "copy", "adapter", "cache"]
NLL = tuple[Tensor, Tensor]


class Reference:
    """The original model, asked without gradients.

    Attributes:
        kind: `copy`, `adapter` or `cache`.
    """

    def __init__(
        self, view: View, kind: ReferenceName, model: nn.Module, *, only_nll: bool
    ) -> None:
        """Choose how.

        Args:
            view: gives the original, if the method declared it.
            kind: how, or `auto`.
            model: the model in training.
            only_nll: whether nothing but `nll` will be asked.

        Raises:
            SettingError: the model has no adapters to switch off, or more than a cache holds is asked.
        """
        adapted = has_adapters(model)
        if kind == "auto":
            kind = "adapter" if adapted else "cache" if only_nll else "copy"
        if kind == "adapter" and not adapted:
            raise SettingError("reference=adapter needs train=lora(R); use copy or cache")
        if kind == "cache" and not only_nll:
            raise SettingError(
                "reference=cache holds likelihoods of answers only, and this method compares more; use "
                "copy, or adapter with train=lora(R)"
            )
        self.kind, self._view = kind, view
        self._copy = view.original() if kind in ("copy", "cache") else None
        self._kept: dict[str, Tensor] = {}

    def ask(self, model: nn.Module, function: Callable[[nn.Module], Any]) -> Any:
        """What a function of a model gives for the original, without gradients.

        Args:
            model: the model in training, which has the adapters.
            function: e.g. `lambda m: view.capability("token_logits")(m, batch)`.
        """
        with torch.no_grad():
            if self._copy is not None:
                return function(self._copy)
            training = model.training
            with adapters_off(model.eval()):
                try:
                    return function(model)
                finally:
                    model.train(training)

    def nll(self, model: nn.Module, batch: Batch, name: str = "train") -> Tensor:
        """Negative log-likelihood [B, T−1] of each answered token under the original, 0 elsewhere.

        Args:
            model: the model in training.
            batch: some samples.
            name: which sequences of the samples these are, where there are several.
        """
        if self.kind != "cache":
            return self.ask(model, lambda m: self._view.capability("token_nll")(m, batch)[0])
        missing = [n for n, i in enumerate(batch.ids.tolist()) if f"{name}/{i}" not in self._kept]
        if missing:
            part = batch.rows(torch.tensor(missing, device=batch.ids.device))
            found = self.ask(model, lambda m: self._view.capability("token_nll")(m, part)[0])
            for i, row in zip(part.ids.tolist(), found.cpu(), strict=True):
                self._kept[f"{name}/{i}"] = row
        width = batch.x["input_ids"].shape[1] - 1
        rows = torch.zeros(len(batch), width)
        for n, i in enumerate(batch.ids.tolist()):
            kept = self._kept[f"{name}/{i}"][:width]  # beyond lies padding, which is 0
            rows[n, : len(kept)] = kept
        return rows.to(batch.ids.device)

    def fill(
        self,
        model: nn.Module,
        named: Iterable[tuple[str, Batch]],
        runtime: Runtime,
        ids: Tensor,
        which: Any = None,
    ) -> None:
        """Ask a cache for everything now and let the copy go.

        With a folder for checkpoints the cache is kept there, and read if it is of these samples.

        Args:
            model: the model in training.
            named: batches and which sequences of the samples they are.
            runtime: the folder, progress.
            ids: of all samples that will be asked for.
            which: what else the sequences depend on, beside samples and seed.
        """
        if self.kind != "cache" or self._copy is None:
            return
        key = [
            hash_model(self._copy), hash_tensors({"ids": ids}), which, runtime.seed,
            runtime.processes,  # each keeps what its share needs
        ]  # fmt: skip
        path: Path | None = None
        if runtime.checkpoint is not None:
            path = (
                runtime.checkpoint / f"reference-{content_key(key)[:16]}-{runtime.rank}.safetensors"
            )
        if path is not None and path.exists():
            self._kept = load_file(path)
        else:
            with runtime.task("reference", None) as task:
                for name, batch in named:
                    self.nll(model, batch, name)
                    task.advance(batch.total)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({k: v.contiguous() for k, v in self._kept.items()}, path)
        if runtime.processes == 1:  # shares of shuffled batches hold samples of other processes
            self._copy = None
