"""What may be a surrogate of an SSCHA run: names in the settings, and objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ase import Atoms

from magus_anharmonic.errors import InputError, typed_line
from magus_anharmonic.evaluator import Evaluation, Evaluator, as_evaluator
from magus_anharmonic.settings import import_path

SURROGATES = {"polynomial": "magus_anharmonic.potential.polynomial:fit"}
"""Name in the settings -> the function ``fit(structures, found) -> Evaluator``; imported when it is
used."""
LOAD = "magus_anharmonic.potential:load"
"""What opens a checkpoint."""
Fit = Callable[[Sequence[Atoms], Evaluation], Evaluator]


@dataclass(frozen=True)
class Surrogate:
    """What a run takes as its surrogate: ``fit`` makes one of the run's configurations, ``fixed``
    is one as it is; ``name`` : of the energy surface, or of the way to it."""

    name: str
    fit: Fit | None = None
    fixed: Evaluator | None = None


def surrogate_of(named: Any, atoms: Atoms, truth: Evaluator | None = None) -> Surrogate | None:
    """What ``sscha.surrogate`` names, or an object: an `Evaluator`, an ASE calculator, something
    with ``fit``, or such a function; ``auto`` : what is best for ``truth``. None where there is
    none; raises ``InputError``."""
    if isinstance(named, str) and named == "auto":
        suits = getattr(truth, "surrogate", None)
        named = suits if suits in SURROGATES else None
    if named is None or named == "none":
        return None
    if not isinstance(named, str):
        return _of_object(named, type(named).__name__, atoms)
    if named in SURROGATES:
        return Surrogate(named, fit=_imported(SURROGATES[named], named))
    path = import_path(named)
    if path is None:
        return _of_object(_imported(LOAD, named)(named), named, atoms)
    return _of_object(_imported(":".join(path.rsplit(".", 1)), named), path, atoms)


def _imported(path: str, named: str) -> Any:
    module, name = path.split(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"sscha.surrogate: {named}: cannot be imported ({typed_line(error)}); give none,"
            f" {', '.join(SURROGATES)}, a checkpoint, or the import path of an evaluator, an ASE"
            " calculator or a function fit(structures, found)"
        ) from None


def _of_object(found: Any, name: str, atoms: Atoms) -> Surrogate:
    try:
        made = found() if isinstance(found, type) else found
        if hasattr(made, "fit"):
            return Surrogate(str(getattr(made, "model_id", name)), fit=made.fit)
        if callable(made) and not hasattr(made, "evaluate"):
            own = getattr(made, "__qualname__", name)
            return Surrogate(f"{getattr(made, '__module__', '')}.{own}", fit=made)
        evaluator = as_evaluator(made, [atoms])
        return Surrogate(evaluator.model_id, fixed=evaluator)
    except TypeError as error:
        raise InputError(f"sscha.surrogate: {name}: {error}") from None
