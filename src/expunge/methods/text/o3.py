r"""O3: for each request an adapter trained on false answers, behind a detector of the request's prompts.

\[
y = W x + \bar w\, \tfrac\alpha R B_t A_t x, \qquad w^* = \max_s w_s(prompt),\ t = \arg\max_s w_s(prompt)
\]

at the linear layers of all blocks, with \(\bar w = 1.2\) where \(w^* \ge 0.9\), 0 up to 0.3, and \(w^*\) between.
Adapter t minimises, on the request's prompts alone,

\[ L = \mathrm{CE}(\text{false answer}) + \lambda_o\, \tfrac1n \sum_{modules} \sum_{s<t} \|A_s A_t^\top\|_F^2 \]

over n blocks. `detector.py` has \(w_s\). No weight of the model changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import NeedsError, SettingError
from expunge.core.hashing import hash_tensors
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.methods.text.idk_dpo import shipped_refusals
from expunge.train.adapters import attach, has_adapters, is_lora, matrices, of_matrices, put_on
from expunge.train.corrupted_prompts import ending_of
from expunge.train.detector import fit_detector
from expunge.train.false_answers import Say, refusing, swapping
from expunge.train.fit import Pass
from expunge.train.gated_adapters import GatedAdapters, begin, features_of
from expunge.train.gated_method import prompts_of
from expunge.train.ledger import Ledger, orthogonality
from expunge.train.method import Training
from expunge.train.norm import NormMode
from expunge.train.steps import StepName
from expunge.train.text import rise_and_fall
from expunge.train.token_losses import IGNORED, token_mean

_TEST = "tests/methods/text/test_o3.py::test_"


@dataclass(frozen=True, kw_only=True)
class O3(Training):
    """Add a gated adapter for a request; suppression, not removal, that can be taken back.

    A result composes with the next request by another adapter and detector beside those it has.
    """

    name: ClassVar[str] = "o3"
    domain: ClassVar[str] = "causal-lm"
    search: ClassVar[Mapping[str, Any]] = {"epochs": None, "lr": None, "orthogonal": None}
    card: ClassVar[Card] = Card(
        title="On Large Language Model Continual Unlearning",
        authors="Gao, Wang, Ding, Weng, Wang, Zhu",
        year=2024,
        link="https://arxiv.org/abs/2407.10223",
        idea="An adapter that answers falsely acts on prompts like those of its request, and on no others.",
        intent="suppression",
        guarantee="inference-time",
        fidelity="variant",
        deviations=(
            Deviation(
                "Each request has an adapter of its own, so that it can be revoked; the official code "
                "goes on with one, as adapters=one does, and then earlier requests come back in part.",
                _TEST + "o3_invariant_4_revoking_restores_a_request_and_leaves_the_others",
            ),
            Deviation(
                "Detectors read the states of three blocks of the model itself unless encoder= names a "
                "text encoder; the paper adapts a masked language model to each request.",
                _TEST + "detectors_read_the_model_itself_or_an_encoder",
            ),
            Deviation(
                "A feature is the mean over the prompt's own tokens, each state of unit norm; the official "
                "code averages over padding too, and lets the first token outweigh the others.",
                _TEST + "o3_invariant_6_features_do_not_depend_on_padding",
            ),
            Deviation(
                "Covariances are shrunk, layers are in units of their mean score, and both parts of a score "
                "rise with the distance.",
                _TEST + "scores_follow_the_formula",
            ),
            Deviation(
                "Every prompt is held out once in five folds; the official code holds out a fifth and "
                "keeps the epoch that is best on retain data.",
                _TEST + "every_prompt_is_held_out_once",
            ),
            Deviation(
                "Weights between 0.4 and 0.9 count as they are; the official code switches them off.",
                _TEST + "the_schedule_follows_the_card",
            ),
            Deviation(
                "A false answer is a refusal, or that of another sample and never the sample's own; the "
                "official letters are the right one at times.",
                _TEST + "false_answers_are_other_answers",
            ),
            Deviation("Adapters have no dropout.", _TEST + "training_follows_the_formula"),
        ),
    )  # fmt: skip

    epochs: int = setting(15, "passes over the request's samples, E", low=1, source="official code")
    lr: float = setting(3e-4, "learning rate, η", above=0, source="official code")
    batch_size: int = setting(128, "samples a batch", low=1, source="official code, 8 × 16")
    step: StepName = setting("adamw", "optimiser: sgd, adam or adamw", source="official code")
    warmup: int = setting(100, "steps in which the learning rate rises, half of all at most", low=0, source="official code")  # fmt: skip
    clip: float = setting(1.0, "largest gradient norm", above=0, source="transformers")
    train: str = setting("lora(8)", "adapters: lora(R) or lora(R, NAME), with α = 2 R", source="official code")  # fmt: skip
    norm: NormMode = setting("frozen", "running statistics: frozen; these models have none")
    orthogonal: float = setting(0.1, "weight of the penalty on overlap with earlier adapters, λ_o", low=0, source="official code")  # fmt: skip
    adapters: Literal["each", "one"] = setting("each", "an adapter for each request, or one that goes on, as in the official code")  # fmt: skip
    targets: Literal["refusals", "answers"] = setting("refusals", "false answers: refusals, or those of other samples", source="official code: by data set")  # fmt: skip
    refusals: tuple[str, ...] = setting((), "refusals to use; the shipped ones if there are none")
    whole: bool = setting(True, "take the loss at the prompt's tokens too", source="official code")
    layers: int = setting(3, "blocks whose states a detector reads, evenly spaced up to the last", low=1, source="measured on tinyfacts")  # fmt: skip
    encoder: str = setting("", "folder or name of a text encoder that reads prompts instead")
    encoder_epochs: int = setting(0, "passes in which it is adapted to the request's prompts; the paper has 2", low=0)  # fmt: skip
    held: float = setting(0.2, "share of prompts held out at a time", above=0, high=0.5, source="official code")  # fmt: skip
    nu: float = setting(0.1, "share of prompts that the one-class SVM may leave out, ν", above=0, high=1, source="official code")  # fmt: skip
    kappa: float = setting(1000.0, "weight of the nearest neighbour, κ", low=0, source="official code")  # fmt: skip
    zeta: float = setting(10.0, "steepness of the weight, ζ", above=0, source="official code")
    full: float = setting(0.9, "weight from which an adapter acts in full", low=0, high=1, source="official code")  # fmt: skip
    boost: float = setting(1.2, "how often it is added then", above=0, source="official code")
    least: float = setting(0.3, "weight up to which it does not act", low=0, high=1, source="official code")  # fmt: skip

    @property
    def needs(self) -> Needs:
        """Prompts and answers to forget, which labels tell apart; nothing of what is kept."""
        more = {"replied"} if self.targets == "refusals" else set()
        return Needs(
            forget=True, labels="forget",
            capabilities=frozenset({"token_nll", *more, *({"tokenizer_text"} if self.encoder else ())}),
        )  # fmt: skip

    def check(self, problem: Problem, request: Request) -> None:
        """Refuse what is no adapter, and a model under a gate that is not what it was.

        Raises:
            SettingError: `train` is not `lora(…)`, the order of `least` and `full` is wrong, or the
                model's requests were made otherwise.
            NeedsError: the model has adapters already.
            ModelError: the model under the gate was changed.
        """
        super().check(problem, request)
        if not is_lora(self.train):
            raise SettingError(f"o3 trains adapters; train={self.train!r} should be lora(R)")
        if self.least > self.full:
            raise SettingError(f"least={self.least:g} lies above full={self.full:g}")
        model = problem.model
        if has_adapters(model):
            raise NeedsError("the model has adapters; merge them before o3 adds its own")
        if isinstance(model, GatedAdapters):
            model.check_inside()
            if model.common["shared"] != (self.adapters == "one"):
                raise SettingError(
                    f"adapters={self.adapters!r}: the requests the model holds were made otherwise"
                )
            if (model.common["encoder"] or {"name": ""})["name"] != self.encoder:
                raise SettingError("the requests the model holds were made with another encoder")
            if len(model.common["layers"]) != min(self.layers, model.common["blocks"]):
                raise SettingError(
                    f"layers={self.layers}: the detectors that the model holds read "
                    f"{len(model.common['layers'])}"
                )
            known = model.common.get("schedule", self._schedule)
            if model.entries and known != self._schedule:
                full, boost, least = known
                raise SettingError(
                    f"earlier requests would act otherwise; take full={full:g}, boost={boost:g} and "
                    f"least={least:g}, as they have"
                )

    @property
    def _schedule(self) -> list[float]:
        return [self.full, self.boost, self.least]

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Fit the detector, train the adapter, and wrap."""
        if runtime.processes > 1:
            raise NeedsError("o3 reads every prompt in one process; run it without others")
        model = view.model(shared=True)
        if isinstance(model, GatedAdapters):
            base, ledger = model.unwrapped, model.ledger()
        else:
            words = view.capability("tokenizer_text")() if self.encoder else ""
            base, ledger = model, begin(
                model, view.role("blocks"), self.layers, shared=self.adapters == "one",
                encoder=self.encoder, words=words,
            )  # fmt: skip
        # the same prompt twice would be known while held out
        prompts = list({tuple(p.tolist()): p for p in prompts_of(view.forget)}.values())
        features, encoder = features_of(base, prompts, ledger, runtime, epochs=self.encoder_epochs)
        detector, held = fit_detector(
            features, runtime.generator("folds"), held=self.held, nu=self.nu, kappa=self.kappa,
            zeta=self.zeta,
        )  # fmt: skip
        outcome = self._train(base, ledger, view, runtime)
        assert outcome.change is not None
        scale, adapter = matrices(outcome.change.tensors)
        tensors = {f"adapter/{n}/{m}": t for n, pair in adapter.items() for m, t in zip("AB", pair, strict=True)}  # fmt: skip
        tensors |= {f"detector/{n}": t for n, t in detector.tensors().items()}
        tensors |= {f"encoder/{n}": t for n, t in encoder.items()}
        entry = {
            "key": view.request.key, "request": view.request.to_dict(), "scale": scale,
            "data": hash_tensors({"ids": view.forget.ids.sort().values}),
            "ending": ending_of(prompts), "orthogonal": self.orthogonal,
        }  # fmt: skip
        common = ledger.common | {"schedule": self._schedule}
        if ledger.common["shared"]:  # of earlier states of the one adapter only A is needed
            kept = tuple({n: t for n, t in one.items() if not n.endswith("/B")} for one in ledger.tensors)  # fmt: skip
            ledger = replace(ledger, tensors=kept)
        change = replace(ledger, common=common).with_request(entry, tensors).wrapper()
        outcome.model, outcome.change = change.apply(view.model().cpu()), change
        outcome.details |= {
            "requests": len(ledger.entries) + 1,
            "weight_of_prompts": float(detector.weight(detector.bank).mean()),
            "weight_held_out": float(held.mean()),
        }
        return outcome

    def _train(self, base: nn.Module, ledger: Ledger, view: View, runtime: Runtime) -> Outcome:
        """Train the request's adapter, from nothing or from the one before."""
        before = ledger.matrices("A")
        if ledger.common["shared"] and before:
            last, scale = ledger.matrices("B")[-1], ledger.entries[-1]["scale"]
            put_on(base, of_matrices(scale, {m: (before[-1][m], b) for m, b in last.items()}))
        else:
            attach(self.train, base, view, runtime.seed_for("lora", len(before)))
        base.to(runtime.device)
        earlier = [{m: a.to(runtime.device) for m, a in one.items()} for one in before]
        own = {n.partition(".lora_A.")[0]: p for n, p in base.named_parameters() if ".lora_A." in n}
        logs: dict[str, list[float]] = {"answers": [], "orthogonality": []}
        say = self._false(view, runtime)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            values, mask = view.capability("token_nll")(model, say(batch))
            answers = token_mean(values, mask, runtime)
            penalty = orthogonality(earlier, own, ledger.common["blocks"])
            for name, part in (("answers", answers), ("orthogonality", penalty)):
                logs[name].append(float(part.detach()))
            return answers + self.orthogonal * penalty

        def passes(epoch: int) -> Pass:
            for batch in view.forget.batches(self.batch_size, runtime.generator("forget", epoch)):
                yield loss, batch

        steps = self.epochs * math.ceil(view.forget_count / self.batch_size)
        pace = rise_and_fall(steps, min(self.warmup, steps // 2))
        outcome, _ = self.train_model(base, passes, view, runtime, clip=self.clip, pace=pace)
        with torch.no_grad():
            end = float(orthogonality(earlier, own, ledger.common["blocks"]))
        outcome.details |= {"losses": logs, "orthogonality": [*logs["orthogonality"][:1], end]}
        return outcome

    def _false(self, view: View, runtime: Runtime) -> Say:
        """What turns a batch into one with false answers, answered from its first token on if wanted."""
        if self.targets == "answers":
            say = swapping(view, runtime)
        else:
            say = refusing(view, runtime, self.refusals or shipped_refusals())

        def whole(batch: Batch) -> Batch:
            other = say(batch)
            real = other.x["attention_mask"].bool()
            return replace(other, y=other.x["input_ids"].masked_fill(~real, IGNORED))

        return whole if self.whole else say
