"""Identity, isotopes and symmetry of structures."""

from __future__ import annotations

import copy as copies
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import spglib
from ase import Atoms
from ase.constraints import FixAtoms
from ase.data import atomic_masses, chemical_symbols

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.io.digests import digest

HYDROGEN = {"D": 2.014, "T": 3.016}
"""Isotopes with symbols of their own, and their masses in amu."""
SAME_MASS = 1e-3
"""Relative difference of two masses that are one: tables of atomic masses differ by less, isotopes
of one element by more."""


def strain_cell(atoms: Atoms, strain: np.ndarray) -> None:
    """Deform cell and atoms by ``strain`` (3, 3), cell -> cell (1 + strain), in place."""
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)


def kinds(atoms: Atoms) -> np.ndarray:
    """(n,) whole numbers, the same for atoms of one element and one mass: the atomic number where
    the mass is the natural one.

    Everything that asks which atoms are alike (identity, symmetry, composition) asks this, so that
    D3S is not H3S.
    """
    numbers = np.asarray(atoms.numbers, dtype=np.int64)
    if not atoms.has("masses"):
        return numbers
    masses = atoms.get_masses()
    natural = np.isclose(masses, atomic_masses[numbers], rtol=SAME_MASS, atol=0.0)
    return np.where(
        natural, numbers, numbers + 1000 * np.round(1000 * np.nan_to_num(masses)).astype(np.int64)
    )


def isotopes(atoms: Atoms) -> dict[str, float]:
    """The masses that are not those of the natural elements, amu by symbol; ``H+2.014`` where an
    element has several."""
    present, first = np.unique(kinds(atoms), return_index=True)
    elements = (present % 1000).tolist()
    found = {}
    for kind, number, index in zip(present, elements, first, strict=True):
        if kind > 999:
            symbol, mass = chemical_symbols[number], float(atoms.get_masses()[index])
            found[f"{symbol}+{mass:g}" if elements.count(number) > 1 else symbol] = mass
    return found


def formula(atoms: Atoms) -> str:
    """Chemical formula, the metals first, with the hydrogen isotopes as D and T: ``'D3S'``."""
    text = atoms.get_chemical_formula(mode="metal")
    masses = atoms.get_masses()[(atoms.numbers == 1) & (kinds(atoms) > 999)]
    heavy = {
        symbol: int(np.isclose(masses, mass, atol=0.02).sum()) for symbol, mass in HYDROGEN.items()
    }
    counts = {"H": int((atoms.numbers == 1).sum()) - sum(heavy.values()), **heavy}
    split = "".join(
        f"{symbol}{number if number > 1 else ''}" for symbol, number in counts.items() if number
    )
    return re.sub(r"H\d*(?![a-z0-9])", split, text)


def with_isotopes(atoms: Atoms, masses: Mapping[str, float]) -> Atoms:
    """A copy (`stripped`) with ``masses`` (amu by symbol) for those of its atoms, in place of what
    they have."""
    copy = stripped(atoms)
    if any(symbol in masses for symbol in atoms.get_chemical_symbols()):
        own = zip(atoms.get_chemical_symbols(), atoms.get_masses(), strict=True)
        copy.set_masses([float(masses.get(symbol, mass)) for symbol, mass in own])
    return copy


UNDECIDED = "not decided"
"""In the space group of a run whose noise leaves two: ``'R3m (160) or Im-3m (229): not decided, 0.4
sigma'``. No finding."""


def decided_group(group: str) -> str:
    """The space group of a run, empty where noise leaves two."""
    return "" if UNDECIDED in group else group


def symbol_of(group: str) -> str:
    """``Im-3m`` of ``'Im-3m (229)'``; where noise leaves two, both: ``R3m or Im-3m``."""
    return " or ".join(one.split(" ")[0] for one in group.split(": ")[0].split(" or "))


def structure_id(atoms: Atoms) -> str:
    """Twelve hex digits that identify species with their masses, cell and positions (rounded to
    1e-6 Angstrom)."""
    arrays = (np.asarray(array, dtype=float) for array in (atoms.cell.array, atoms.positions))
    return digest(kinds(atoms), *(np.round(array, 6) + 0.0 for array in arrays))


def stripped(atoms: Atoms, *, constraints: bool = False, moments: bool = False) -> Atoms:
    """Species, cell, positions and masses (and ``constraints``, or the initial magnetic ``moments``
    and charges) alone: no calculator, info or other arrays."""
    copy = Atoms(
        numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc
    )
    if atoms.has("masses"):
        copy.set_masses(atoms.get_masses())
    for name in ("initial_magmoms", "initial_charges") if moments else ():
        if atoms.has(name):
            copy.set_array(name, atoms.get_array(name))
    if constraints:
        copy.constraints = copies.deepcopy(atoms.constraints)
    return copy


def as_pymatgen(atoms: Atoms) -> dict[str, Any]:
    """``Structure.as_dict()`` of pymatgen; deuterium and tritium are D and T, other masses are not
    kept there."""
    hydrogens = {round(mass): symbol for symbol, mass in HYDROGEN.items()}
    symbols = [
        hydrogens.get(round(mass), "H") if symbol == "H" else symbol
        for symbol, mass in zip(atoms.symbols, atoms.get_masses(), strict=True)
    ]
    sites = [
        {"species": [{"element": symbol, "occu": 1}], "abc": abc.tolist(), "properties": {}}
        for symbol, abc in zip(symbols, atoms.get_scaled_positions(wrap=False), strict=True)
    ]
    return {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "lattice": {"matrix": atoms.cell.array.tolist(), "pbc": [True, True, True]},
        "sites": sites,
    }


def from_pymatgen(data: Any) -> list[Atoms]:
    """The structures in what pymatgen writes as JSON: one, a list of them or a mapping from names,
    also inside of entries and documents (``structure``); empty where there is none.

    ``info`` has the properties, and where sites are shared ``occupancy``.
    """
    if isinstance(data, list):
        return [atoms for one in data for atoms in from_pymatgen(one)]
    if not isinstance(data, dict):
        return []
    if not ("sites" in data and "lattice" in data):
        inner = data["structure"] if "structure" in data else list(data.values())
        return from_pymatgen(inner)
    shares = [{one["element"]: one["occu"] for one in site["species"]} for site in data["sites"]]
    symbols = [next(iter(share)) for share in shares]
    atoms = Atoms(
        ["H" if symbol in HYDROGEN else symbol for symbol in symbols],
        cell=data["lattice"]["matrix"],
        scaled_positions=[site["abc"] for site in data["sites"]],
        pbc=True,
    )
    if HYDROGEN.keys() & set(symbols):
        natural = zip(symbols, atoms.get_masses(), strict=True)
        atoms.set_masses([HYDROGEN.get(symbol, mass) for symbol, mass in natural])
    atoms.info.update(data.get("properties") or {})
    if any(share != {symbol: 1} for share, symbol in zip(shares, symbols, strict=True)):
        atoms.info["occupancy"] = dict(enumerate(shares))
    return [atoms]


def fixed_atoms(atoms: Atoms) -> np.ndarray:
    """(N,) bool: the atoms that ASE's FixAtoms holds; raises MagusAnharmonicError for every other
    constraint."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if type(constraint) is not FixAtoms:
            raise MagusAnharmonicError(
                f"the constraint {type(constraint).__name__} cannot be kept, only FixAtoms can;"
                " take it out"
            )
        fixed[constraint.index] = True
    return fixed


def spglib_cell(atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The (lattice, scaled positions, `kinds`) triple that spglib takes: isotopes are no images of
    each other."""
    return atoms.cell.array, atoms.get_scaled_positions(), kinds(atoms)


def spglib_or_none(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call spglib; None where it fails (overlapping atoms, flat cells), and for numbers that are
    not finite, which end the process.

    spglib returns None then, but raises once any package (phonopy, symfc, ASE) has set its
    ``OLD_ERROR_HANDLING`` to False.
    """
    lattice, positions, _ = arguments[0]
    if not (np.isfinite(lattice).all() and np.isfinite(positions).all()):
        return None
    try:
        return function(*arguments, **options)
    except getattr(spglib, "SpglibError", ()):
        return None


def space_group(atoms: Atoms, symprec: float = 0.05) -> str:
    """International symbol and number, e.g. ``'R3m (160)'``; ``'P1 (1)'`` when spglib finds
    none."""
    found = spglib_or_none(spglib.get_spacegroup, spglib_cell(atoms), symprec=symprec)
    return found or "P1 (1)"


def number_of(group: str) -> int:
    """229 of ``'Im-3m (229)'``; 0 where there is none."""
    found = re.search(r"\((\d+)\)", group)
    return int(found[1]) if found else 0


def standardized(atoms: Atoms, symprec: float, **options: Any) -> Atoms | None:
    """spglib's ``standardize_cell`` with the masses kept; None where spglib finds none."""
    found = spglib_or_none(spglib.standardize_cell, spglib_cell(atoms), symprec=symprec, **options)
    if found is None:
        return None
    lattice, positions, found_kinds = found
    standard = Atoms(
        numbers=np.asarray(found_kinds) % 1000, scaled_positions=positions, cell=lattice, pbc=True
    )
    if atoms.has("masses"):
        masses = dict(zip(kinds(atoms).tolist(), atoms.get_masses().tolist(), strict=True))
        standard.set_masses([masses[int(kind)] for kind in found_kinds])
    return standard


def primitive(atoms: Atoms, symprec: float = 0.05) -> Atoms:
    """Symmetrised primitive cell in the orientation of the input; the input itself when spglib
    finds none."""
    found = standardized(atoms, symprec, to_primitive=True, no_idealize=True)
    return stripped(atoms) if found is None else found


SAME_POSITION_TOLERANCE = 1e-4
"""Angstrom, and relative change of a cell, below which a structure is what it was."""


def change_of(given: Atoms, after: Atoms, own: Atoms | None = None) -> str:
    """What a calculator did to the structure that it was given, as a predicate; empty where it is
    what it was.

    ``own`` is the calculator's own copy, whose order and cell its results have: it may be wrapped,
    shifted and rotated, but not sorted, moved or strained.
    """
    if len(after) != len(given):
        return f"changed the number of atoms from {len(given)} to {len(after)}"
    if not np.array_equal(after.numbers, given.numbers):
        return "sorted the atoms"
    size = max(1.0, float(np.abs(given.cell.array).max()))
    if np.abs(after.cell.array - given.cell.array).max() > SAME_POSITION_TOLERANCE * size:
        return "strained the cell"
    if _apart(given, after).max(initial=0.0) > SAME_POSITION_TOLERANCE:
        return "moved or reordered the atoms"
    if not isinstance(own, Atoms) or own is after or len(own) != len(given):
        return ""
    if not np.array_equal(own.numbers, given.numbers):
        return "sorted the atoms"
    metric = given.cell.array @ given.cell.array.T
    if (
        given.pbc.all()
        and np.abs(own.cell.array @ own.cell.array.T - metric).max()
        > 2 * SAME_POSITION_TOLERANCE * np.abs(metric).max()
    ):
        return "strained the cell"
    apart = _apart(given, own) if given.pbc.all() else np.zeros(1)
    return (
        "moved or reordered the atoms" if apart.max(initial=0.0) > SAME_POSITION_TOLERANCE else ""
    )


def _apart(given: Atoms, other: Atoms) -> np.ndarray:
    """Distance of each atom from where it was, A: whole lattice vectors and a shift of all left
    out."""
    if not given.pbc.all() or abs(given.cell.volume) < 1e-8:
        return np.linalg.norm(other.positions - given.positions, axis=1)
    moved = other.cell.scaled_positions(other.positions) - given.cell.scaled_positions(
        given.positions
    )
    moved -= moved[:1]
    return np.linalg.norm((moved - np.round(moved)) @ given.cell.array, axis=1)
