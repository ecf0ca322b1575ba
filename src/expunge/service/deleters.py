"""Which deleter a policy's entry stands for."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, cast

from expunge.core.errors import UserError
from expunge.service.deleter import Deleter
from expunge.service.policy import CustomModel, Policy, ShardedModel

WANTED = (
    "evidence", "resolve", "weights", "plan", "forget", "audit", "predictor", "verify", "retire",
)  # fmt: skip


def deleter_for(policy: Policy, name: str) -> Deleter:
    """Make the deleter of a model.

    Raises:
        UserError: there is no such model, or what it names cannot be loaded.
    """
    model = policy.model(name)
    if isinstance(model, CustomModel):
        made = imported(model.deleter, policy)(**model.settings)
        if missing := [n for n in WANTED if not hasattr(made, n)]:
            raise UserError(f"{model.deleter} returns no deleter: it has no {', '.join(missing)}")
        return cast(Deleter, made)
    if isinstance(model, ShardedModel):
        from expunge.service.sharded_deleter import ShardedDeleter

        return ShardedDeleter(policy, model, name)
    from expunge.service.method_deleter import MethodDeleter

    return MethodDeleter(policy, model, name)


def imported(path: str, policy: Policy) -> Any:
    """Import `package.module:name`, from beside the policy file too.

    Raises:
        UserError: it cannot be imported.
    """
    module, colon, name = path.partition(":")
    before = list(sys.path)
    sys.path[:0] = [str(policy.file.parent), os.getcwd()]
    try:
        if not colon:
            raise ImportError("there is no : in it")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be imported ({error}); write package.module:function"
        ) from error
    finally:
        sys.path[:] = before
