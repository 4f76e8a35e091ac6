"""Labelers, evaluators and fitnesses of other packages, by the entry points that these declare: see
docs/write-your-own.md.

Nothing of such a package is imported before its name is used.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from magus_anharmonic.errors import InputError, is_machine_error, typed_line

Kind = Literal["labelers", "evaluators", "fitness"]


def declared(kind: Kind) -> dict[str, list[EntryPoint]]:
    """Name -> its entry points of the group ``magus_anharmonic.KIND``; more than one where packages
    share a name."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=f"magus_anharmonic.{kind}"):
        # an editable install beside a wheel lists the same entry point twice
        found.setdefault(point.name, {})[point.value] = point
    return {name: list(points.values()) for name, points in sorted(found.items())}


def origin(point: EntryPoint) -> str:
    """``module:attribute of distribution 1.2``."""
    dist = point.dist
    return f"{point.value} of {dist.name} {dist.version}" if dist else point.value


@functools.cache
def load(kind: Kind, name: str) -> Any:
    """What a declared name stands for; raises ``InputError`` that says whose it is and why it
    cannot be loaded."""
    first, *others = declared(kind)[name]
    if others:
        whose = " and ".join(origin(point) for point in (first, *others))
        raise InputError(f"{name}: is declared by more than one package ({whose}); uninstall one")
    try:
        return first.load()
    except (Exception, SystemExit) as error:  # a module may do anything while it is imported
        if is_machine_error(error):
            raise
        raise InputError(f"{name}: {origin(first)} cannot be loaded: {typed_line(error)}") from None
