"""Problem: what a model is, for every method and audit.

`each_loss(model, batch) -> Tensor[B]` is the only function a kind of model must fill. The rest
are capabilities, discovered by name.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from expunge.core.data import Batch, Data
from expunge.core.errors import DataError, NeedsError, UserError
from expunge.core.hashing import (
    beside_weights,
    content_key,
    hash_function,
    hash_model,
    hash_tensors,
)
from expunge.core.pruned import keep_only, kept_of
from expunge.core.request import Request
from expunge.core.runtime import Runtime, random_restored

Recipe = Callable[[Tensor, int], nn.Module]


class Problem:
    """A model, its data with stable ids, and a few functions of `(model, batch)`."""

    kind: ClassVar[str] = "custom"

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        test: Any = None,
        *,
        valid: Any = None,
        recipe: Recipe | None = None,
        build: Callable[[], nn.Module] | None = None,
        roles: Mapping[str, list[str]] | None = None,
        name: str = "",
        source: Mapping[str, Any] | None = None,
        tuned: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Describe a model and its data.

        Args:
            model: the trained model; it is copied, never changed.
            train: training data: `Data`, a torch `Dataset`, or `(X, y)`.
            test: held-out data of the same kind; audits use it, methods never see it.
            valid: validation data that a method may declare and use.
            recipe: `recipe(keep_ids, seed) -> model`, training from a fresh initialisation on the
                samples `keep_ids`; it makes retrained references and exact methods possible.
            build: makes an untrained model of the same architecture; taken from the recipe or a
                transformers config where there is one.
            roles: names of modules by role (`"last layer"`, …) where the default guess is wrong.
            name: a short name for tables.
            source: how to build this problem again, for `reproduce`.
            tuned: settings per method name that suit this problem, with their source elsewhere.
        """
        self.model = copy.deepcopy(model).eval()
        if not any(p.requires_grad for p in self.model.parameters()):
            self.model.requires_grad_(True)  # frozen for inference, not by design
        self.train = Data.of(train)
        self.test = None if test is None else Data.of(test)
        self.valid = None if valid is None else Data.of(valid)
        self.recipe = recipe
        self._build = build or getattr(recipe, "build", None)
        self._roles = dict(roles or {})
        self.name = name or type(model).__name__
        self.source = dict(source or {})
        self.tuned = {k: dict(v) for k, v in (tuned or {}).items()}
        self._extra: dict[str, Callable[..., Any]] = {}
        self._hashes: dict[str, str] = {}
        self.beside_models: dict[
            str, dict[Any, Any]
        ] = {}  # audits' subjects of other models, by request

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Any,
        *,
        each_loss: Callable[[nn.Module, Batch], Tensor],
        **more: Any,
    ) -> Problem:
        """Describe an unusual model by functions, without a subclass.

        Args:
            model: the trained model.
            data: training data.
            each_loss: per-sample losses [B] of a batch.
            **more: keyword arguments of `Problem` (test=, recipe=, …); every other callable is a
                capability by its name, e.g. `logits=`, `features=`.

        Returns:
            The problem.

        Raises:
            UserError: an argument is neither one of `Problem` nor a function.
        """
        known = inspect.signature(Problem.__init__).parameters
        problem = cls(model, data, **{k: v for k, v in more.items() if k in known})
        extra = {"each_loss": each_loss} | {k: v for k, v in more.items() if k not in known}
        for name, function in extra.items():
            if not callable(function):
                raise UserError(f"a problem has no argument {name!r}; a capability is a function")
        problem._extra = extra
        vars(problem).update(extra)  # the functions given go before those of a subclass
        return problem

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Per-sample training loss [B]; the one mandatory function.

        Raises:
            NeedsError: neither a subclass nor `Problem.of` gave one.
        """
        raise NeedsError("this problem has no each_loss; use Problem.of(model, data, each_loss=…)")

    def logits_and_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and per-sample losses [B]; a kind that knows how runs the model once."""
        return self.capability("logits")(model, batch), self.each_loss(model, batch)

    def can(self, capability: str) -> bool:
        """Whether a capability is offered."""
        return capability in self._extra or callable(getattr(self, capability, None))

    def capability(self, name: str) -> Callable[..., Any]:
        """Return the function behind a capability.

        Raises:
            NeedsError: it is not offered.
        """
        if name in self._extra:
            return self._extra[name]
        found = getattr(self, name, None)
        if not callable(found):
            raise NeedsError(f"a {self.kind} problem does not offer {name!r}; pass {name}=")
        return found

    def fresh(self, seed: int) -> nn.Module:
        """Return an untrained model of the same architecture, every module drawn anew.

        Raises:
            NeedsError: nobody said how to build one, or what was built has other weights.
        """
        build = self._build
        config = getattr(self.model, "config", None)
        if build is None and hasattr(config, "to_dict"):  # a transformers model
            build = functools.partial(type(self.model), copy.deepcopy(config))
        if build is None:
            raise NeedsError("an untrained model of the same architecture is needed; pass build=")
        with random_restored():
            torch.manual_seed(seed)
            model = build().eval()
        shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, self.model)]
        if shapes[0] != shapes[1]:
            raise NeedsError("build= makes a model whose weights have other names or shapes")
        return model if self.kept is None else keep_only(model, self.kept)

    @property
    def kept(self) -> dict[str, Tensor] | None:
        """The mask the model was pruned to, by parameter name; None if it is dense."""
        return kept_of(self.model)

    def pruned(
        self,
        model: nn.Module,
        kept: Mapping[str, Tensor],
        *,
        recipe: Recipe | None,
        name: str,
        source: Mapping[str, Any],
    ) -> Self:
        """Return the same problem about a pruned model; every later update keeps its zeros.

        Args:
            model: the model after pruning; it is copied.
            kept: True where a weight stays.
            recipe: trains under the same mask.
            name: of the new problem.
            source: how to build it again.
        """
        other = copy.copy(self)
        other.model = keep_only(copy.deepcopy(model).eval(), kept)
        other.recipe, other.name, other.source = recipe, name, dict(source)
        other._hashes, other.beside_models = {}, {}
        return other

    def about(self, model: nn.Module, train: Data | None = None) -> Self:
        """Return the same problem about another model, such as one that a request left behind.

        It cannot be rebuilt from a source.

        Args:
            model: of the same architecture, perhaps wrapped; it is copied.
            train: training data that is left; as before if None.
        """
        other = copy.copy(self)
        other.model = copy.deepcopy(model).eval()
        if not any(p.requires_grad for p in other.model.parameters()):
            other.model.requires_grad_(True)
        other.train = other.train if train is None else train
        other.source, other._hashes, other.beside_models = {}, {}, {}
        return other

    def role(self, name: str) -> list[str]:
        """Module names that play a role in *this* model.

        Raises:
            NeedsError: no module plays it.
        """
        if name in self._roles:
            return self._roles[name]
        if name == "last layer":
            linear = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
            if linear:
                return linear[-1:]
        raise NeedsError(
            f"no module of this model is known as {name!r}; pass roles={{{name!r}: [...]}}"
        )

    def check(self) -> None:
        """Look at one sample before any long work; subclasses add what they know.

        Raises:
            DataError: the loss is not one finite number a sample.
        """
        batch = self.train.fetch(self.train.ids[:2])
        if batch.y is None:
            return
        with torch.no_grad():
            loss = self.each_loss(self.model, batch)
        if loss.shape != (len(batch),) or not bool(torch.isfinite(loss).all()):
            raise DataError(
                f"each_loss must give one finite number a sample, got shape {tuple(loss.shape)}"
            )

    def split(self, request: Request) -> dict[str, Tensor]:
        """Ids of the splits that audits speak of.

        Returns:
            `forget-train`, `retain-train`, and where there is test data `forget-test` (test samples
            of the classes or targets asked for; empty unless whole classes or a range of targets
            are forgotten) and `retain-test`.
        """
        forget = request.resolve(self.train)
        splits = {"forget-train": forget, "retain-train": self.train.without(forget)}
        if self.test is not None:
            # not `resolve`: a class without test samples is fine, and so is no other class
            asked = request.alike(self.test)
            splits |= {"forget-test": asked, "retain-test": self.test.without(asked)}
        return splits

    def model_hash(self) -> str:
        """SHA-256 of the original weights."""
        if "model" not in self._hashes:
            self._hashes["model"] = hash_model(self.model)
        return self._hashes["model"]

    def fingerprint(self) -> dict[str, str | None]:
        """Hashes of the weights, of what trains and computes beside them, and of every data set.

        The mode of a model is no part: a problem keeps its model in evaluation mode.
        """
        data = (self.train, self.test, self.valid)
        return {
            "kind": self.kind,
            "model": self.model_hash(),
            "mask": None if self.kept is None else hash_tensors(self.kept),
            "architecture": content_key([str(self.model), self._roles]),
            "attributes": self._attributes(),
            "trained parameters": content_key(_trained(self.model)),
            "columns": content_key([None if d is None else d.described() for d in data]),
            "functions": content_key({n: hash_function(f) for n, f in self._extra.items()}),
            "train": self.train.fingerprint(),
            "test": None if self.test is None else self.test.fingerprint(),
            "valid": None if self.valid is None else self.valid.fingerprint(),
        }

    def _attributes(self) -> str:
        """What the model computes with beside its weights; read once, as a model may count its calls."""
        if "attributes" not in self._hashes:
            self._hashes["attributes"] = content_key(beside_weights(self.model))
        return self._hashes["attributes"]

    def recipe_key(self) -> str:
        """Content key of the recipe: its own `key()`, or what it does and holds.

        Raises:
            NeedsError: there is no recipe.
        """
        if self.recipe is None:
            raise NeedsError("there is no recipe; pass recipe= to allow retrained references")
        own = getattr(self.recipe, "key", None)
        if callable(own):
            return str(own())
        return content_key([hash_function(self.recipe), str(self.model)])


def _trained(model: nn.Module) -> list[str]:
    """Names of the parameters that train, one name for those that modules share."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def run_recipe(recipe: Recipe, keep: Tensor, seed: int, runtime: Runtime) -> nn.Module:
    """Run a recipe, on the runtime's device if it takes a `runtime`; the model comes back on CPU.

    The global generators start from the seed, so that a recipe that draws from them without seeding
    them gives another model for another seed, and the same for the same one.
    """
    try:
        takes = "runtime" in inspect.signature(recipe).parameters
    except (TypeError, ValueError):  # built in another language: ask for no more than the contract
        takes = False
    with random_restored():  # somebody's recipe may seed whatever it likes, or nothing at all
        Runtime(seed=seed).seed_everything("recipe")
        made = recipe(keep, seed, runtime=runtime) if takes else recipe(keep, seed)  # type: ignore[call-arg]
    return made.cpu()
