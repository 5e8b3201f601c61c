"""Things that have names: the built-in ones, and those that installed packages bring.

A package adds one through an entry point group: a name and what makes the thing. Nothing of a
package is loaded before it is asked for. It knows no kind of thing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Any

from ..errors import CrowdMeshError, InvalidValueError, MissingExtraError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlugIns:
    """One kind of things by name."""

    group: str
    """Of the entry points."""
    kind: str
    """For people: "solver", "movement model"."""
    built_in: Mapping[str, tuple[Callable[..., Any], str]]
    """Name -> (what makes it, one line on it)."""
    method: str
    """What a made thing must have, with its arguments: "solve(problem)"."""
    unknown: type[CrowdMeshError] = InvalidValueError
    """Raised for a name that nobody has."""
    unfit: type[CrowdMeshError] = InvalidValueError
    """Raised for a thing without the method."""

    def listed(self) -> Mapping[str, str]:
        """Name -> one line on it, built-in ones first, then those of other packages."""
        found = {name: line for name, (_, line) in self.built_in.items()}
        for name, point in sorted(self._points().items()):
            found.setdefault(name, f"from {_distribution(point)} ({point.value})")
        return MappingProxyType(found)

    def factory(self, name: str) -> Callable[..., Any]:
        """What makes the thing of that name.

        Raises:
            (self.unknown): None of that name; names those known, and the nearest.
            MissingExtraError: The package that brings it cannot be imported.
        """
        if name in self.built_in:
            return self.built_in[name][0]
        point = self._points().get(name)
        if point is None:
            known = self.listed()
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise self.unknown(f"no {self.kind} {name!r}{hint}\n  known    {', '.join(known)}")
        try:
            return point.load()
        except (ImportError, AttributeError) as exc:
            raise MissingExtraError(
                f"{self.kind} {name!r} of {_distribution(point)} cannot be imported: {exc}\n"
                f"  try      pip install {_distribution(point)} with its extras"
            ) from exc

    def make(self, given: Any, **options: Any) -> Any:
        """The thing of that name with those options, or the object itself.

        Raises:
            (self.unknown), MissingExtraError: As `factory`.
            InvalidValueError: An option that it does not take, or options beside an object.
            (self.unfit): It lacks the method.
        """
        if not isinstance(given, str):
            if options:
                raise InvalidValueError(
                    f"options {', '.join(sorted(options))} come with a {self.kind}'s name; an"
                    " object is made with its own"
                )
            return self._fit(given, type(given).__name__)
        factory = self.factory(given)
        try:
            made = factory(**options)
        except TypeError as exc:
            if not options:
                raise
            raise InvalidValueError(
                f"{self.kind} {given!r} does not take these options: {exc}"
            ) from exc
        return self._fit(made, given)

    def _fit(self, made: Any, name: str) -> Any:
        if not callable(getattr(made, self.method.partition("(")[0], None)):
            raise self.unfit(f"{name!r} is no {self.kind}: it has no {self.method}")
        return made

    def _points(self) -> dict[str, metadata.EntryPoint]:
        return {point.name: point for point in metadata.entry_points(group=self.group)}


def _distribution(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module
