"""Which energy surface an ASE calculator is: an id of its class, its parameters, and its numbers
for fixed structures.

Parameters alone do not tell: weights, files and attributes that a calculator does not list change
what it returns.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii

from magus_anharmonic.errors import MagusAnharmonicError, is_machine_error, one_line
from magus_anharmonic.io.digests import digest

OUTPUT_KEYS = {
    "directory",
    "label",
    "prefix",
    "txt",
    "logfile",
    "outfile",
    "restart",
    "command",
    "profile",
    "atoms",
}
"""Parameters of ASE's calculators that say where files and programs are, not what the numbers
are."""
DIGITS = 5
"""Decimals of a number of the fingerprint in scientific notation: rounding of another processor is
below them."""


class NoIdError(MagusAnharmonicError):
    """A calculator of which no id can be made; says why."""


def parameters_digest(calculator: Any) -> str:
    """Digest of class, module and parameters (``todict``); files among them count by their content,
    wherever they lie."""
    kind = type(calculator)
    found = _parameters(calculator)
    shown = {key: _plain(value) for key, value in found.items() if key not in OUTPUT_KEYS}
    return digest([kind.__module__, kind.__qualname__, shown], length=None)


def calculator_id(calculator: Any, elements: Sequence[str]) -> str:
    """Class name and twelve hexadecimal digits of parameters and of energies and forces of
    `probes`; the calculator stays as it is.

    elements : symbols of the compound. Raises `NoIdError` where the calculator does not evaluate
    the probes, and what the machine raises.
    """
    if not elements:
        raise NoIdError("the elements are not known")
    numbers = [f"{number:.{DIGITS}e}" for number in _numbers(calculator, probes(elements))]
    parts = [parameters_digest(calculator), sorted(set(elements)), numbers]
    return f"{_name(calculator)}-{digest(parts)}"


def unnamed(calculator: Any) -> str:
    """An id that no other evaluator has, here or anywhere."""
    return f"{_name(calculator)}{_UNNAMED}{os.urandom(6).hex()}"


def is_unnamed(model_id: str) -> bool:
    """Whether the id says that nothing is known about the energy surface."""
    return _UNNAMED in model_id


_UNNAMED = "-unnamed-"


def _name(calculator: Any) -> str:
    return type(calculator).__name__.lower()


def probes(elements: Sequence[str]) -> list[Atoms]:
    """Two distorted chains of atoms that hold every element twice, one with the small atoms at
    their bond lengths, one with the large."""
    symbols = sorted(set(elements))
    sites = [*symbols, *reversed(symbols)]
    radii = np.array([covalent_radii[atomic_numbers[symbol]] for symbol in symbols])
    shifts = 0.04 * np.sin(np.arange(1, 3 * len(sites) + 1) ** 2).reshape(-1, 3)
    found = []
    for spacing in (2.1 * radii.mean(), 2.4 * radii.max() + 0.3):
        cell = spacing * np.array(
            [[1.0, 0.05, 0.0], [0.0, 1.02, 0.04], [0.03, 0.0, 0.98 * len(sites)]]
        )
        scaled = np.array([[0.0, 0.0, index / len(sites)] for index in range(len(sites))])
        found.append(Atoms(sites, positions=scaled @ cell + spacing * shifts, cell=cell, pbc=True))
    return found


def _numbers(calculator: Any, structures: Sequence[Atoms]) -> np.ndarray:
    """Energy (eV) of each structure, their difference, and two components of the forces (eV/A)
    along fixed directions."""
    energies, forces = [], []
    try:
        with _apart(calculator) as duplicate:
            for atoms in structures:
                atoms.calc = duplicate
                energies.append(float(atoms.get_potential_energy()))
                pattern = np.cos(np.arange(2 * 3 * len(atoms))).reshape(2, -1)
                forces.extend(pattern @ np.asarray(atoms.get_forces(), dtype=float).ravel())
    except (
        Exception
    ) as error:  # a calculator may raise anything for structures that it was not made for
        if is_machine_error(error):
            raise
        raise NoIdError(one_line(f"{type(error).__name__}: {error}", 160)) from error
    numbers = np.array([*energies, *np.diff(energies), *forces])
    if not np.isfinite(numbers).all():
        raise NoIdError("its energies or forces are not finite")
    return numbers


@contextlib.contextmanager
def _apart(calculator: Any) -> Iterator[Any]:
    """A copy of the calculator that writes its files, if any, into a folder of its own."""
    try:
        duplicate = copy.deepcopy(calculator)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError, ValueError):
        duplicate = copy.copy(
            calculator
        )  # handles of files, libraries and devices are shared, results and parameters are not
    if callable(getattr(duplicate, "reset", None)):
        duplicate.reset()
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        if isinstance(getattr(duplicate, "directory", None), str | Path):
            duplicate.directory = folder
        yield duplicate


def _parameters(calculator: Any) -> dict[str, Any]:
    todict = getattr(calculator, "todict", None)
    try:
        found = todict() if callable(todict) else getattr(calculator, "parameters", {})
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        RuntimeError,
        NotImplementedError,
    ):  # the numbers still tell
        found = getattr(calculator, "parameters", {})
    return dict(found) if isinstance(found, Mapping) else {}


def _plain(value: Any) -> Any:
    """What of a parameter JSON can hold; a file as the digest of its content."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _plain(item)
            for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        ]
    if isinstance(value, str | Path):
        return _content(str(value)) or str(value)
    if value is None or isinstance(value, bool | int | float | complex):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if callable(getattr(value, "todict", None)):
        return [type(value).__qualname__, _plain(_parameters(value))]
    return getattr(value, "__qualname__", type(value).__qualname__)


def _content(text: str) -> str | None:
    path = Path(text).expanduser()
    try:
        found = path.stat() if len(text) < 4096 and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # no text that names a file
        return None
    return (
        None
        if found is None
        else _digest_of(str(path.resolve()), found.st_mtime_ns, found.st_size, found.st_ino)
    )


@lru_cache(maxsize=256)
def _digest_of(path: str, *_changes: int) -> str:
    return digest(Path(path), length=None)
