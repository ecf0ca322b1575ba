"""What a request covers in some data, with what it names in vain kept apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from expunge.core.data import Data
from expunge.core.errors import RequestError
from expunge.core.request import Request


class Covering:
    """Looks requests up in one data set; its ids and names are indexed once."""

    def __init__(self, data: Data) -> None:
        """Index the data."""
        self.data = data
        self.known = set(data.ids.tolist())
        ids = data.ids.tolist()
        self._names = {} if data.names is None else dict(zip(data.names, ids, strict=True))

    def covers(self, request: Request) -> tuple[list[int], list[int | str]]:
        """Find what a request covers.

        Returns:
            Sample ids, sorted; and what it names that the data lacks.

        Raises:
            RequestError: nothing is covered, or the data knows no such form of request.
        """
        if request.ids is not None:
            return self._named(request.ids)
        if request.user is not None:
            return self._of_users(request.user), []
        if request.fraction is not None:
            raise RequestError("a share of random samples is no deletion request")
        try:
            return request.resolve(self.data).tolist(), []
        except RequestError as error:
            if "covers all" in str(error):  # the caller sees how much of it is left
                return sorted(self.known), []
            raise

    def _named(self, wanted: Sequence[int | str]) -> tuple[list[int], list[int | str]]:
        found, unknown = set(), []
        for one in wanted:
            if isinstance(one, str) and one in self._names:
                found.add(self._names[one])
            elif _whole(one) and int(one) in self.known:
                found.add(int(one))
            else:
                unknown.append(one)
        return sorted(found), unknown

    def _of_users(self, users: Sequence[int | str]) -> list[int]:
        column = self.data.columns.get("user")
        if column is None:
            raise RequestError("the data has no column user; name ids, a label or a condition")
        texts = np.asarray([str(v) for v in column])
        ids = self.data.ids.numpy()[np.isin(texts, [str(u) for u in users])]
        if not len(ids):
            raise RequestError("none of the users it names has a sample in the data")
        return sorted(ids.tolist())


def _whole(one: int | str) -> bool:
    return isinstance(one, int) or re.fullmatch(r"-?[0-9]{1,19}", one) is not None
