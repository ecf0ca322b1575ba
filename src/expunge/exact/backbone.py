"""The network that the stages of a trained model build on, checked against the manifest."""

from __future__ import annotations

import copy

from torch import nn

from expunge.core.errors import ModelError
from expunge.core.hashing import hash_model
from expunge.core.problem import Problem
from expunge.exact.folder import Folder
from expunge.exact.now import Now


def backbone_for(folder: Folder, given: nn.Module | Problem | None) -> nn.Module | None:
    """A copy of the backbone with the weights that training started from.

    Args:
        folder: of the trained model; weights of a training that started fresh lie there.
        given: the network, or the problem whose model it is; None for no backbone.

    Returns:
        The backbone; None if none was given.

    Raises:
        StoreError: there is no model in the folder.
        ModelError: it was trained on another backbone.
    """
    named = Now.read(folder).manifest["backbone"]
    if given is None:
        return None
    base = copy.deepcopy(given.model if isinstance(given, Problem) else given)
    if named["stored"]:
        try:
            base.load_state_dict(folder.get(named["stored"]["tensors"]))
        except RuntimeError as error:
            raise ModelError("the model in the folder has another architecture") from error
    if hash_model(base) != named["hash"]:
        raise ModelError("the model in the folder was trained on another backbone")
    return base
