"""Adapters behind detectors: each request's adapter acts on prompts like those of the request.

One model holds any number of requests. A prompt's weight w is that of the detector it resembles most, and
the adapter of that request is added w times, or not at all where w is small; who resembles none gets
the model inside, to the bit. The weight is decided on the prompt and kept while decoding.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from expunge.core.errors import ModelError
from expunge.core.hashing import hash_model
from expunge.core.outcome import Outcome
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.taps import read_taps
from expunge.problems.tokens import Tokens, pad
from expunge.train.corrupted_prompts import end_of, real_places
from expunge.train.detector import Detector
from expunge.train.ledger import Ledger
from expunge.train.text_encoder import TextEncoder, adapt, pool


@dataclass
class Gated:
    """What decoding goes on with: the model's cache, and each row's weight [B] and request [B]."""

    cache: Any
    weights: Tensor
    chosen: Tensor


class GatedAdapters(nn.Module):
    """A language model whose adapters act on prompts that their detectors know.

    Takes and returns what the model inside does; `past_key_values` also holds the rows' weights.
    """

    def __init__(self, model: nn.Module, settings: Tensor, **tensors: Tensor) -> None:
        """Wrap.

        Args:
            model: the model inside; it is not changed. If it is wrapped so already, the new
                requests take the place of those it held.
            settings: bytes of a JSON text: a ledger's `common` and `entries`.
            **tensors: `PLACE/NAME` of each entry.

        Raises:
            ModelError: the model inside is not the one that the requests were made for.
        """
        super().__init__()
        self.unwrapped: nn.Module = model.unwrapped if isinstance(model, GatedAdapters) else model
        held: dict[str, Any] = json.loads(bytes(settings.tolist()))
        self.common, self.entries = held["common"], held["entries"]
        self.register_buffer("text", settings)
        self._names: dict[str, str] = {}
        for name, tensor in tensors.items():
            self._names[name] = name.replace(".", ":")  # no dots in names of buffers
            self.register_buffer(self._names[name], tensor)
        self.check_inside()
        ledger = self.ledger()
        self._detectors = [
            Detector.of({n[9:]: t for n, t in found.items() if n.startswith("detector/")})
            for found in ledger.tensors
        ]
        self._adapted = [list(found) for found in ledger.matrices("B")]
        self._readers = _readers(ledger)

    def check_inside(self) -> None:
        """Compare the model inside with the one that detectors and adapters were made for.

        Raises:
            ModelError: it is another one, or was trained since.
        """
        if hash_model(self.unwrapped) != self.common["base"]:
            raise ModelError(
                "the model under the gate is not the one its adapters were made for, or was changed "
                "since; detectors and adapters would act at random. Start from the original"
            )

    def ledger(self) -> Ledger:
        """All requests that the model holds."""
        tensors: list[dict[str, Tensor]] = [{} for _ in self.entries]
        for name, buffer in self._names.items():
            place, _, rest = name.partition("/")
            tensors[int(place)][rest] = getattr(self, buffer)
        return Ledger(self.common, tuple(self.entries), tuple(tensors))

    def forward(self, *args: Tensor, past_key_values: Any = None, **inputs: Any) -> Any:
        """Run the model inside, with the adapter of the request that each row resembles.

        Raises:
            ModelError: embeddings are given in place of token ids, or a cache that this model did
                not give.
        """
        ids = args[0] if args else inputs.get("input_ids")
        if ids is None:
            raise ModelError("o3 looks at token ids; pass input_ids=, not embeddings")
        if past_key_values is not None:
            if not isinstance(past_key_values, Gated):
                raise ModelError("o3 keeps rows' weights with the cache; begin without one")
            return self._run(past_key_values, args, inputs)
        features, plain = self._read(ids, inputs.get("attention_mask"), args, inputs)
        gate = Gated(None, *self.decide(features))
        # where gradients are wanted the output is made again, with them
        if plain is not None and not bool(gate.weights.any()) and not torch.is_grad_enabled():
            return _keep(plain, gate)
        return self._run(gate, args, inputs)

    def prompts(self, ids: Tensor, mask: Tensor | None, ending: Sequence[int]) -> Tensor:
        """Which tokens [B, T] belong to prompts: those up to the ending that prompts share."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for row, places in enumerate(real_places(ids, mask)):
            end = end_of(ids[row, places].cpu(), list(ending))
            found[row, places[:end]] = True
        return found

    def weights(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights w [B, N] of every row under each of N detectors, before the schedule.

        Args:
            ids: token ids [B, T].
            mask: attention mask [B, T].
        """
        inputs = {} if mask is None else {"attention_mask": mask}
        features, _ = self._read(ids, mask, (), {"input_ids": ids, **inputs})
        return self._weigh(features)

    def decide(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weight [B] of each row after the schedule, and the request [B] whose adapter acts on it."""
        device = next(self.unwrapped.parameters()).device
        if not self.entries:
            return torch.zeros(1, device=device), torch.zeros(1, dtype=torch.long, device=device)
        largest, chosen = self._weigh(features).max(1)
        return schedule(largest, *self.common["schedule"]).to(device), chosen.to(device)

    def _weigh(self, features: Sequence[Tensor]) -> Tensor:
        found = [d.weight(f) for d, f in zip(self._detectors, features, strict=True)]
        return torch.stack(found, 1) if found else torch.zeros(0, 0)

    @torch.no_grad()
    def _read(
        self, ids: Tensor, mask: Tensor | None, args: tuple[Tensor, ...], inputs: dict[str, Any]
    ) -> tuple[list[Tensor], Any]:
        """Features [B, L, D] for each detector, and the model's output if it was run for them."""
        endings = [tuple(e["ending"]) for e in self.entries]
        places = {ending: self.prompts(ids, mask, ending) for ending in set(endings)}
        if self._readers:
            prompts = {
                ending: [row[there] for row, there in zip(ids, found, strict=True)]
                for ending, found in places.items()
            }
            read = zip(self._readers, endings, strict=True)
            return [reader.features(prompts[ending]) for reader, ending in read], None
        outputs: list[Any] = []
        states = read_taps(
            self.unwrapped, self.common["layers"],
            lambda m: outputs.append(m(*args, **inputs)), flat=False,
        )  # fmt: skip
        pooled = {ending: pool(states.values(), found) for ending, found in places.items()}
        return [pooled[ending] for ending in endings], outputs[0]

    def _run(self, gate: Gated, args: tuple[Tensor, ...], inputs: dict[str, Any]) -> Any:
        """Run the model inside with adapters added to some rows."""
        handles = []
        try:
            for name, hook in self._hooks(gate).items():
                handles.append(self.unwrapped.get_submodule(name).register_forward_hook(hook))
            if gate.cache is not None:
                inputs = inputs | {"past_key_values": gate.cache}
            return _keep(self.unwrapped(*args, **inputs), gate)
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, gate: Gated) -> dict[str, Callable[..., Tensor]]:
        """By module: what adds each request's adapter to its rows."""
        acting: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
        for place in gate.chosen[gate.weights > 0].unique().tolist():
            rows = ((gate.chosen == place) & (gate.weights > 0)).nonzero()[:, 0]
            source = len(self.entries) - 1 if self.common["shared"] else place
            scale = gate.weights[rows][:, None, None] * self.entries[source]["scale"]
            for module in self._adapted[source]:
                a, b = (getattr(self, self._names[f"{source}/adapter/{module}/{m}"]) for m in "AB")
                acting.setdefault(module, []).append((rows, a, b, scale))

        def hook_of(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Callable[..., Tensor]:
            def hook(_module: nn.Module, given: Any, output: Tensor) -> Tensor:
                output = output.clone()
                for rows, a, b, scale in parts:
                    added = linear(linear(given[0][rows].to(a.dtype), a), b) * scale.to(a.dtype)
                    output[rows] += added.to(output.dtype)
                return output

            return hook

        return {module: hook_of(parts) for module, parts in acting.items()}


def schedule(weight: Tensor, full: float, boost: float, least: float) -> Tensor:
    """What w counts: `boost` from `full` on, w itself above `least`, nothing below."""
    kept = torch.where(weight > least, weight, torch.zeros_like(weight))
    return torch.where(weight >= full, torch.full_like(weight, boost), kept).float()


def begin(
    model: nn.Module, blocks: Sequence[str], layers: int, *, shared: bool, encoder: str, words: str
) -> Ledger:
    """A ledger without requests for a model that has no gate yet.

    Args:
        model: the model inside.
        blocks: names of its blocks.
        layers: how many of them detectors read, evenly spaced up to the last.
        shared: one adapter for all requests.
        encoder: name of a text encoder that reads prompts instead, or nothing.
        words: the model's tokenizer as a JSON text, for that encoder.
    """
    count = min(layers, len(blocks))
    chosen = [blocks[math.ceil(len(blocks) * (n + 1) / count) - 1] for n in range(count)]
    reader = {"name": encoder, "hash": TextEncoder(encoder, words).hash} if encoder else None
    return Ledger({
        "base": hash_model(model), "layers": chosen, "blocks": len(blocks), "shared": shared,
        "encoder": reader, "words": words,
    })  # fmt: skip


def features_of(
    model: nn.Module,
    prompts: Sequence[Tensor],
    ledger: Ledger,
    runtime: Runtime,
    *,
    epochs: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features [n, L, D] of prompts for a new detector, and the adapters of the encoder that reads them.

    Args:
        model: the model inside.
        prompts: token ids [T] of each.
        ledger: says what reads prompts.
        runtime: seeds.
        epochs: passes in which an encoder is adapted to the prompts.
    """
    encoder, words = ledger.common["encoder"], ledger.common["words"]
    if encoder is None:
        return own_features(model, prompts, ledger.common["layers"]), {}
    reader, adapted = TextEncoder(encoder["name"], words, wanted=encoder["hash"]), {}
    if epochs:
        adapted = adapt(encoder["name"], reader.texts(prompts), runtime, epochs=epochs)
        reader = TextEncoder(encoder["name"], words, adapted)
    return reader.features(prompts), adapted


@torch.no_grad()
def own_features(model: nn.Module, prompts: Sequence[Tensor], layers: list[str]) -> Tensor:
    """Features [n, L, D] of prompts: mean states of a language model's own layers."""
    parts = []
    device = next(model.parameters()).device
    for start in range(0, len(prompts), 32):
        rows = [
            Tokens(p, torch.ones_like(p, dtype=torch.bool)) for p in prompts[start : start + 32]
        ]
        inputs = {n: t.to(device) for n, t in pad(rows, 0)[0].items()}
        states = read_taps(model, layers, functools.partial(_call, inputs=inputs), flat=False)
        parts.append(pool(states.values(), inputs["attention_mask"].bool()).cpu())
    return torch.cat(parts)


def _call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    return model(**inputs)


def revoke(outcome: Outcome, request: Request) -> Outcome:
    """Take one request out of a gated model: its prompts are answered as if it had never come.

    Adapters and detectors of other requests keep every bit. What was stored before, such as folders of
    earlier outcomes, still holds the request; delete it.

    Args:
        outcome: of the last request; its model holds all of them.
        request: the request to take back, as it was made.

    Returns:
        An outcome like that of `settled`.

    Raises:
        RequestError: the model holds no such request.
        NeedsError: its requests share one adapter.
        ModelError: the model holds no requests, or the model under the gate was changed.
    """
    return settled(outcome, _gated(outcome).ledger().without(request.key))


def settled(outcome: Outcome, ledger: Ledger | None = None) -> Outcome:
    """All requests of a gated model as one change of the model under the gate.

    The outcome of a later request is a change of the model that held the earlier ones; this one needs the
    original alone, so that one folder holds all there is.

    Args:
        outcome: of the last request.
        ledger: other requests than those the model holds.

    Returns:
        An outcome without a request of its own: `record["requests"]` lists what it holds.

    Raises:
        ModelError: the model holds no requests, or the model under the gate was changed.
    """
    model = _gated(outcome)
    change = (ledger or model.ledger()).wrapper()
    made = change.apply(copy.deepcopy(model.unwrapped)).eval()
    assert isinstance(made, GatedAdapters)
    record: dict[str, Any] = {n: outcome.record[n] for n in ("problem", "source", "runtime", "packages") if n in outcome.record}  # fmt: skip
    record |= {"weights": hash_model(made), "requests": [e["request"] for e in made.entries]}
    problem = outcome.problem
    if problem is not None:
        problem = problem.about(model.unwrapped)
        record["fingerprint"] = problem.fingerprint()
    else:
        record["fingerprint"] = {"model": made.common["base"]}
    return Outcome(made, change, record=record, problem=problem)


def _gated(outcome: Outcome) -> GatedAdapters:
    model = outcome.runnable()
    if not isinstance(model, GatedAdapters):
        raise ModelError("the model holds no requests to revoke; unlearn with o3 to have them")
    model.check_inside()
    return model


def _keep(output: Any, gate: Gated) -> Any:
    """The model's output, with the rows' weights beside its cache."""
    if getattr(output, "past_key_values", None) is not None:
        output.past_key_values = Gated(output.past_key_values, gate.weights, gate.chosen)
    return output


def _readers(ledger: Ledger) -> list[TextEncoder]:
    """What reads prompts for each detector; none where the model inside does."""
    encoder = ledger.common["encoder"]
    if encoder is None:
        return []
    return [
        TextEncoder(
            encoder["name"],
            ledger.common["words"],
            {n[8:]: t for n, t in tensors.items() if n.startswith("encoder/")},
            wanted=encoder["hash"],
        )
        for tensors in ledger.tensors
    ]
