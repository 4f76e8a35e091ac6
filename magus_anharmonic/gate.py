"""The gate for every structure that comes in: a file of a user, or ``Atoms`` handed over in Python,
in every command.

What passes is what it seems: finite, of known elements with whole occupancies and masses that these
elements can have, and, where a crystal is asked for, periodic in three directions without atoms on
top of one another. What does not is refused before any work, by the name it has.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ase import Atoms
from ase.data import atomic_masses, chemical_symbols, covalent_radii
from ase.geometry import minkowski_reduce

from magus_anharmonic.errors import InputError, one_line
from magus_anharmonic.io.digests import from_json
from magus_anharmonic.io.files import readable
from magus_anharmonic.structures import HYDROGEN, SAME_MASS, from_pymatgen

log = logging.getLogger(__name__)

T = TypeVar("T")

NAMES = ("name", "id", "identity", "label", "key", "title")
"""``info`` keys by which structures are called."""
OCCUPANCIES = re.compile(r"(.*_)?occ(upanc(y|ies))?", re.IGNORECASE)
"""Keys under which ASE's readers keep them: in ``info`` (CIF), or as an array (PDB, TEM formats,
extended XYZ)."""
MASSES = re.compile(r"(atomic_?|isotope_?)?mass(es)?", re.IGNORECASE)
"""Columns of extended XYZ that are meant as masses; ASE takes ``masses`` alone for them."""
MASS_RANGE = (0.1, 4.0)
"""Of the natural mass: muonium is 0.11 of hydrogen, tritium 3.0; beyond, the mass is that of
another element, or none."""
MIN_VOLUME = 0.3
"""A^3/atom; hydrogen at 5 TPa has more."""
OVERLAP, COINCIDENT = 0.35, 0.4
"""Atoms nearer than this part of their covalent radii, or than so many A, are one atom twice (split
sites, an image written out)."""
FARTHEST = 1e5
"""A: coordinates and cells beyond it lose the digits by which neighbours are told, or are in
another unit."""
WITHOUT_ELEMENTS = {"lammps-dump-binary": "it holds numbers of types, no elements"}
"""Formats of which ASE takes the number of a type for the atomic number."""
INDEX = re.compile(r"|-?\d+|(-?\d+)?:(-?\d+)?(:(?!-?0+$)(-?\d+)?)?")
"""ASE's numbers and ranges of structures after the @; empty: all."""
OF_ANYTHING = (".dat", ".in", ".json", ".log", ".md", ".out")
"""Endings that ASE takes for a code's, and that other files of a folder have too."""


class NoStructures(InputError):
    """A file that is none of structures, or damaged."""


def read_structures(
    path: str | Path, *, index: int | str = ":", format: str | None = None, crystal: bool = True
) -> list[Atoms]:
    """The structures of any file that ASE reads, or that pymatgen wrote as JSON, checked; raises
    ``InputError`` that names the file and every structure that will not do.

    ``index``: as in ASE. ``crystal``: see `check_structure`.
    """
    from ase.io import read
    from ase.io.formats import filetype, string2index

    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    with readable(file, "structures by ASE", NoStructures, isotope_hint):
        kind = format or filetype(str(file))
        _require_elements(file, kind)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            known = from_pymatgen(_json(file)) if kind == "json" else []
            found: Any = (
                known[string2index(str(index))] if known else read(file, index=index, format=format)
            )
    for warning in said:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    _require_sites_of_one_element(file, [str(warning.message) for warning in said])
    structures = [found] if isinstance(found, Atoms) else list(found)
    if not structures:
        raise NoStructures(f"{file}: holds no structure")
    check_structures(structures, f"{file}: ", crystal=crystal)
    return structures


def _json(file: Path) -> Any:
    from ase.io.formats import open_with_compression

    with open_with_compression(str(file)) as stream:
        return from_json(stream.read())


def read_sources(sources: Sequence[str | Path]) -> list[Atoms]:
    """The structures of files, folders, patterns and databases, in their order, each with
    ``info['name']``: its file, and where that holds several ``file@number``.

    A source is a file (`read_structures`), whole or in ASE's own syntax (``all.extxyz@0:3``,
    ``found.db@energy<0``: the rows selected, named by their id); a folder, of which every file is
    taken whose format ASE reads (without those of `OF_ANYTHING` that hold no structures); or a
    pattern as of a shell (``relaxed/*.vasp``). Raises
    ``InputError`` that names every source and structure that will not do; what is named twice is
    taken once.
    """
    found: dict[str, Atoms] = {}
    problems: list[str] = []
    for source in sources:
        try:
            files, index, listed = _files(str(source))
        except InputError as error:
            problems += error.problems
            continue
        for file in files:
            try:
                structures = _named(file, index)
            except InputError as error:
                if listed and isinstance(error, NoStructures) and file.suffix in OF_ANYTHING:
                    log.warning("%s; left out", error)
                else:
                    problems += error.problems
                continue
            for atoms in structures:
                name = atoms.info["name"]
                if found.setdefault(os.path.abspath(name), atoms) is not atoms:
                    log.warning("%s: is named twice, and taken once", name)
    if problems:
        raise InputError(*problems)
    return list(found.values())


def _files(source: str) -> tuple[list[Path], str, bool]:
    """Files of a source, its part after the @, and whether a folder listed them."""
    name, _, index = source.rpartition("@")
    if Path(source).exists() or not name:
        name, index = source, ""
    path = Path(name)
    if path.is_dir():
        there = [file for file in sorted(path.iterdir()) if file.is_file()]
        files = [file for file in there if _known_format(file)]
        if not files:
            raise InputError(f"{path}: holds no file of a format that ASE knows")
        if others := [file.name for file in there if file not in files]:
            log.info("%s: no structures in %s", path, ", ".join(others))
        return files, index, True
    if path.is_file() or not any(mark in name for mark in "*?["):
        return [path], index, False
    files = sorted(Path(match) for match in glob.glob(name))
    if not files:
        raise InputError(f"{name}: matches no file")
    return files, index, False


def _known_format(file: Path) -> bool:
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    if file.name.startswith("."):
        return False
    try:
        kind = filetype(str(file))
    except UnknownFileTypeError:
        return False
    except Exception:  # damaged: whoever reads it says how
        return True
    return kind in ioformats and ioformats[kind].can_read


def _named(file: Path, index: str) -> list[Atoms]:
    if file.suffix == ".db" and file.is_file():
        return _rows(file, index)
    every = read_structures(file)
    names = [f"{file}@{number}" if len(every) > 1 else str(file) for number in range(len(every))]
    for atoms, name in zip(every, names, strict=True):
        _call(atoms, name)
    if not index:
        return every
    if not INDEX.fullmatch(index):
        raise InputError(f"{file}@{index}: must be a number or a range, e.g. @0, @0:3, @-1")
    return _chosen(every, index, file)


def _chosen(every: list[T], index: str, file: Path) -> list[T]:
    if ":" not in index:
        chosen = every[int(index) : int(index) + 1 or None]
    else:
        chosen = every[slice(*(int(part) if part else None for part in index.split(":")))]
    if not chosen:
        raise InputError(f"{file}@{index}: no such structure; the file holds {len(every)}")
    return chosen


def _call(atoms: Atoms, name: str) -> None:
    """What its file calls it is kept as ``name_given``."""
    if "name" in atoms.info:
        atoms.info["name_given"] = atoms.info["name"]
    atoms.info["name"] = name


def _rows(file: Path, selection: str) -> list[Atoms]:
    """Rows of a database of ASE, selected or numbered as there, called by their id."""
    from ase.db import connect

    numbers = INDEX.fullmatch(selection)
    with readable(file, f"rows of a database that match {selection!r}", InputError):
        rows = list(connect(file).select(None if numbers else selection))
    if numbers and selection:
        rows = _chosen(rows, selection, file)
    if not rows:
        raise InputError(f"{file}@{selection}: selects no row")
    found = []
    for row in rows:
        atoms = row.toatoms()
        atoms.info.update(row.key_value_pairs)
        _call(atoms, f"{file}@id={row.id}")
        found.append(atoms)
    check_structures(found, f"{file}: ")
    return found


def isotope_hint(error: BaseException) -> str:
    """What to write instead of D and T, if that is what a reader of ASE stumbled over; else
    empty."""
    said = str(error.args[0]) if isinstance(error, KeyError) and error.args else ""
    found = re.search(r"(?:^|label )([DT])\d*\.?$", said)
    if found is None:
        return ""
    symbol, mass = found[1], HYDROGEN[found[1]]
    return (
        f" ({symbol} is no element but hydrogen of {mass:g} amu: write H, and give the mass in a"
        f" column masses of extended XYZ, or to phase-diagram as isotopes: {{{symbol}: {{H:"
        f" {mass:g}}}}})"
    )


def check_structures(structures: Sequence[Atoms], where: str = "", *, crystal: bool = True) -> None:
    """Raise one ``InputError`` with a line for each structure that `check_structure` refuses;
    ``where`` is put before its number."""
    problems = []
    for number, atoms in enumerate(structures):
        try:
            check_structure(atoms, f"{where}structure {number}", crystal=crystal)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)


def check_structure(atoms: Atoms, where: str = "structure", *, crystal: bool = True) -> None:
    """Raise ``InputError`` that begins with ``where`` and the name of the structure, unless it can
    be worked with.

    ``crystal=False`` (labels to learn from): molecules and atoms very near each other pass.
    """
    problem = next(_problems(atoms, crystal), None)
    if problem is not None:
        raise InputError(f"{where}{_called(atoms)} {problem}")


def _called(atoms: Atoms) -> str:
    if len(atoms) == 0:
        return ""
    known = ((atoms.numbers >= 0) & (atoms.numbers < len(chemical_symbols))).all()
    formula = atoms.get_chemical_formula() if known else f"{len(atoms)} atoms"
    names = (one_line(str(atoms.info[key]), 80) for key in NAMES if atoms.info.get(key) is not None)
    name = next(filter(None, names), "")
    return f" ({name}, {formula})" if name and name != formula else f" ({formula})"


def _problems(atoms: Atoms, crystal: bool) -> Iterator[str]:
    if len(atoms) == 0:
        yield "has no atoms"
        return
    bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if len(bad):
        yield f"has coordinates that are not finite (atom {bad[0]}, {len(bad)} in all)"
    if not np.isfinite(atoms.cell.array).all():
        yield "has a cell that is not finite"
    if max(np.abs(atoms.positions).max(), np.abs(atoms.cell.array).max()) > FARTHEST:
        yield (
            f"has coordinates or a cell beyond {FARTHEST:g} A; give it wrapped, in a reduced cell,"
            " in A"
        )
    unknown = np.flatnonzero((atoms.numbers < 1) | (atoms.numbers >= len(chemical_symbols)))
    if len(unknown):
        yield f"has an atom of no known element (atom {unknown[0]})"
    yield from _occupancy_problems(atoms)
    yield from _mass_problems(atoms)
    if crystal:
        yield from _crystal_problems(atoms)


def _occupancy_problems(atoms: Atoms) -> Iterator[str]:
    for name in filter(OCCUPANCIES.fullmatch, map(str, atoms.info)):
        sites = atoms.info[name]
        for site in (
            list(sites.values())
            if isinstance(sites, dict)
            else []
            if sites is None
            else np.ravel(sites).tolist()
        ):
            shares = site if isinstance(site, dict) else {"": site}
            if len(shares) > 1 or any(not _is_one(share) for share in shares.values()):
                shown = ", ".join(f"{symbol} {share}".strip() for symbol, share in shares.items())
                yield f"has partial occupancies ({shown}): write out one ordered structure"
    for name in filter(OCCUPANCIES.fullmatch, atoms.arrays):
        column = atoms.arrays[name]
        partial = next(
            (
                index
                for index, share in enumerate(column)
                if not np.all([_is_one(x) for x in np.ravel(share)])
            ),
            None,
        )
        if partial is not None:
            yield (
                f"has partial occupancies (atom {partial}: {column[partial]}): write out one"
                " ordered structure"
            )


def _is_one(share: Any) -> bool:
    """Whether an occupancy is whole; one that is not given is, which CIF writes as ``?`` or
    ``.``."""
    if share is None or str(share).strip() in ("?", "."):
        return True
    try:
        return bool(abs(float(share) - 1.0) < 1e-3)
    except (TypeError, ValueError):
        return False


def _mass_problems(atoms: Atoms) -> Iterator[str]:
    for name in set(filter(MASSES.fullmatch, atoms.arrays)) - {"masses"}:
        column = atoms.arrays[name]
        if (
            column.shape == (len(atoms),)
            and column.dtype.kind in "fiu"
            and np.allclose(column, atoms.get_masses(), rtol=SAME_MASS)
        ):
            continue
        yield f"has a column {name!r}, which is not read: call it masses (amu), or leave it out"
    if not atoms.has("masses"):
        return
    masses = np.asarray(atoms.get_masses(), dtype=float)
    ratio = masses / atomic_masses[atoms.numbers]
    wrong = np.flatnonzero(
        ~((ratio > MASS_RANGE[0]) & (ratio < MASS_RANGE[1]) & np.isfinite(ratio))
    )
    if len(wrong):
        index = int(wrong[0])
        natural = atomic_masses[atoms.numbers[index]]
        yield (
            f"has masses that cannot be (atom {index}, {atoms.symbols[index]}: {masses[index]:g}"
            f" amu, natural {natural:.4g})"
        )


def _crystal_problems(atoms: Atoms) -> Iterator[str]:
    from vesin import NeighborList  # it loads torch, which reading settings and tables need not

    cell = atoms.cell.array
    if atoms.cell.rank < 3 or abs(np.linalg.det(cell)) < 1e-6:
        yield (
            "has no cell; give a structure with a three-dimensional periodic cell (POSCAR, CIF,"
            " extxyz with Lattice=)"
        )
        return
    if not atoms.pbc.all():
        yield "is not periodic in three directions: it has no three-dimensional periodic cell"
    volume = abs(np.linalg.det(cell)) / len(atoms)
    if volume < MIN_VOLUME:
        yield f"has {volume:.2g} A^3/atom, which cannot be (units of the cell?)"
        return
    try:
        reduced = minkowski_reduce(cell)[0]
    except (RuntimeError, ValueError, OverflowError):
        yield "has a cell so skewed that it cannot be reduced; give a reduced one"
        return
    if not np.isclose(abs(np.linalg.det(reduced)), abs(np.linalg.det(cell)), rtol=1e-6):
        yield "has a cell so skewed that its volume is lost in rounding; give a reduced one"
        return
    radii = covalent_radii[atoms.numbers]
    # vesin divides the cell into boxes of that size
    reach = max(
        2.0 * OVERLAP * float(radii.max()), COINCIDENT, 0.2 * (volume * len(atoms)) ** (1 / 3)
    )
    finder = NeighborList(cutoff=reach, full_list=True, n_threads=1)
    first, second, distance = finder.compute(
        points=atoms.positions, box=reduced, periodic=True, quantities="ijd"
    )
    near = np.flatnonzero(
        distance < np.maximum(OVERLAP * (radii[first] + radii[second]), COINCIDENT)
    )
    if len(near):
        one, other, apart = int(first[near[0]]), int(second[near[0]]), float(distance[near[0]])
        pair = f"{atoms.symbols[one]} {one} and {atoms.symbols[other]} {other}"
        yield (
            f"has atoms on top of one another: {pair}, {apart:.3f} A (a disordered site, or an atom"
            " written twice?)"
        )


def _require_elements(file: Path, kind: str) -> None:
    """Raise ``InputError`` for a file that numbers its types and does not say which elements they
    are."""
    from ase.io.formats import open_with_compression

    reason = WITHOUT_ELEMENTS.get(kind, "")
    if kind in ("lammps-dump-text", "lammps-data"):
        with open_with_compression(str(file)) as stream:
            lines = [line.split() for line in stream]
        headers = [words for words in lines if words[:2] == ["ITEM:", "ATOMS"]]
        if kind == "lammps-data" and ["Masses"] not in [words[:1] for words in lines]:
            reason = "its section Masses, which tells the elements, is missing"
        if kind == "lammps-dump-text" and not (
            headers and all("element" in words for words in headers)
        ):
            reason = (
                "its types are no elements; add the column element (LAMMPS: dump_modify ... element"
                " S H)"
            )
    if reason:
        raise InputError(f"{file} ({kind}): does not say which elements its atoms are: {reason}")


def _require_sites_of_one_element(file: Path, warned: Sequence[str]) -> None:
    """Raise ``InputError`` where ASE left out an atom of a CIF file because one of another element
    is in its place."""
    pairs = [re.search(r"scaled_positions (\d+) and (\d+) are equivalent", text) for text in warned]
    if not any(pairs):
        return
    from ase.io.cif import parse_cif
    from ase.io.formats import open_with_compression

    with open_with_compression(str(file), "rb") as stream:
        contents = [block.get_symbols() for block in parse_cif(stream) if block.has_structure()]
    for symbols in contents:
        for one, other in (tuple(map(int, pair.groups())) for pair in pairs if pair):
            if max(one, other) < len(symbols) and symbols[one] != symbols[other]:
                raise InputError(
                    f"{file}: {symbols[one]} and {symbols[other]} are in one place: write out one"
                    " ordered structure"
                )
