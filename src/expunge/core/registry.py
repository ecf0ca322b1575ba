"""Names to classes, lazily: a table at the edge, plus entry points for other people's classes."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any

from expunge.core.errors import UserError


class Registry:
    """A table of kebab-case names to `"module:Class"`, opened only when something is asked for."""

    def __init__(self, noun: str, table: Mapping[str, str], group: str) -> None:
        """Keep the table.

        Args:
            noun: what the entries are, for messages (`"method"`).
            table: name → `"package.module:Attribute"`.
            group: entry-point group through which other packages add entries.
        """
        self.noun = noun
        self._table = dict(table)
        self._group = group

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, built-in ones first."""
        return iter(self._all())

    def get(self, name: str) -> Any:
        """Return what a name, or a dotted path `pkg.module.Class`, stands for.

        Raises:
            UserError: there is no such thing; the nearest names are suggested.
        """
        table = self._all()
        if name in table:
            module, attribute = table[name].split(":")
            return getattr(importlib.import_module(module), attribute)
        if "." in name:
            module, _, attribute = name.replace(":", ".").rpartition(".")
            try:
                return getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError, ValueError, TypeError) as error:
                raise UserError(f"{name} cannot be imported ({error})") from error
        near = difflib.get_close_matches(name, table, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(table)}"
        raise UserError(f"no {self.noun} is called {name!r}; {hint}")

    def by_class(self, attribute: str) -> Any:
        """Return the built-in entry whose class has this name.

        Raises:
            AttributeError: there is none.
        """
        for path in self._table.values():
            if path.endswith(":" + attribute):
                return getattr(importlib.import_module(path.split(":")[0]), attribute)
        raise AttributeError(f"no {self.noun} class is called {attribute!r}")

    def class_names(self) -> list[str]:
        """Class names of the built-in entries."""
        return [path.split(":")[1] for path in self._table.values()]

    def _all(self) -> dict[str, str]:
        table = dict(self._table)
        for point in importlib.metadata.entry_points(group=self._group):
            table.setdefault(point.name, point.value)
        return table
