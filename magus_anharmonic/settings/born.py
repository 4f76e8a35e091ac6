"""Born effective charges and the high-frequency dielectric tensor of one structure: what the
non-analytic term of its phonons needs, from phonopy's ``BORN`` or ph.x's dynamical matrix beside
the structure, or as arrays.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from ase import Atoms
from pydantic import AfterValidator, Field, model_validator

from magus_anharmonic.errors import InputError, one_line
from magus_anharmonic.gate import check_structure, read_structures
from magus_anharmonic.io.files import readable
from magus_anharmonic.settings.section import Element, InsidePath, Section, parse

SYMMETRIC = 0.1
"""|e|, and for the dielectric tensor a tenth of its trace's mean: by so much a component may differ
from what the space group and the neutrality of the crystal ask for (phonopy's limit too)."""
SYMPREC = 1e-3
"""A, for the space group of the structure that the charges are of."""


class Born(Section):
    """Charges and dielectric tensor of the crystal ``symbols`` (n), ``cell`` (3, 3) and
    ``positions`` (n, 3), A.

    charges : (n, 3, 3) in |e|, Z[a, i, j] = polarisation along i by a displacement of atom a along
    j; dielectric : (3, 3), of the electrons alone. Both Cartesian, in the frame of ``cell``.
    Refused where they break the space group or the neutrality by more than `SYMMETRIC`.
    """

    symbols: list[Element]
    cell: list[list[float]]
    positions: list[list[float]]
    charges: list[list[list[float]]]
    dielectric: list[list[float]]

    @classmethod
    def of(cls, atoms: Atoms, charges: np.ndarray, dielectric: np.ndarray) -> Born:
        """From arrays: ``charges`` (n, 3, 3) of ``atoms`` in their order, ``dielectric`` (3, 3).
        Raises ``InputError``."""
        check_structure(atoms)
        data = {"cell": atoms.cell.array, "positions": atoms.positions}
        data |= {"charges": np.asarray(charges, float), "dielectric": np.asarray(dielectric, float)}
        arrays = {name: array.tolist() for name, array in data.items()}
        return parse(cls, {"symbols": atoms.get_chemical_symbols(), **arrays}, "born")

    @property
    def atoms(self) -> Atoms:
        """The structure; masses of nature, on which the charges do not depend."""
        return Atoms(self.symbols, positions=self.positions, cell=self.cell, pbc=True)

    @model_validator(mode="after")
    def _physical(self) -> Born:
        n = len(self.symbols)
        for name, shape in {
            "positions": (n, 3), "cell": (3, 3), "charges": (n, 3, 3), "dielectric": (3, 3)
        }.items():  # fmt: skip
            try:
                array = np.array(getattr(self, name), dtype=float)
            except ValueError:  # rows of different lengths
                array = np.zeros(0)
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{name}: must be {shape} finite numbers for {n} atoms")
        charges, dielectric = np.array(self.charges), np.array(self.dielectric)
        lowest = np.linalg.eigvalsh(0.5 * (dielectric + dielectric.T))[0]
        if lowest < 1.0:
            raise ValueError(
                f"dielectric: lowest eigenvalue {lowest:.3g}: that of an insulator's electrons is"
                " above 1 (a metal has no non-analytic term)"
            )
        left = np.abs(charges.sum(axis=0)).max() / n
        if left > SYMMETRIC:
            raise ValueError(
                f"charges: add up to {left:.2f} |e| per atom instead of 0: not converged, or of"
                " another structure"
            )
        even, tensor = symmetrised(self.atoms, charges, dielectric)
        off = np.abs(even - charges).max()
        if off > SYMMETRIC:
            raise ValueError(
                f"charges: break the space group of the structure by {off:.2f} |e|: of another"
                " structure, or in another Cartesian frame or order of atoms"
            )
        if np.abs(tensor - dielectric).max() > SYMMETRIC * np.trace(tensor) / 3.0:
            raise ValueError("dielectric: breaks the space group of the structure: another frame?")
        return self


def symmetrised(
    atoms: Atoms, charges: np.ndarray, dielectric: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Charges (n, 3, 3) and dielectric tensor (3, 3) averaged over the space group of ``atoms``,
    charges without their sum."""
    from phonopy.structure.symmetry import symmetrize_borns_and_epsilon

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken symmetry, which the caller judges
        cell = phonopy_cell(atoms)
        even, tensor = symmetrize_borns_and_epsilon(charges, dielectric, cell, symprec=SYMPREC)
    return even, 0.5 * (tensor + tensor.T)


def phonopy_cell(atoms: Atoms) -> Any:
    """phonopy's own ``Atoms``, with the masses."""
    from phonopy.structure.atoms import PhonopyAtoms

    return PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        cell=atoms.cell.array,
        positions=atoms.positions,
        masses=atoms.get_masses(),
    )


def read_born(structure: str | Path, file: str | Path) -> Born:
    """Charges of the crystal in the file ``structure``: phonopy's ``BORN`` (its first line, of
    units and cutoffs, is not used: charges and dielectric tensor have no unit), or the dynamical
    matrix at q = 0 of Quantum ESPRESSO's ph.x with ``epsil``, of the same atoms in the same order
    and frame. Raises ``InputError``."""
    found = read_structures(structure)
    if len(found) != 1:
        raise InputError(f"{structure}: holds {len(found)} structures; charges are of one")
    (atoms,), path = found, Path(file)
    if not path.is_file():
        raise InputError(f"{path}: no such file (phonopy's BORN, of {structure})")
    with readable(path, "Born charges"):
        text = path.read_text(encoding="utf-8")
    of_phonons = _of_ph_x(text)
    charges, dielectric = of_phonons or _of_phonopy(atoms, path, structure)
    try:
        return Born.of(atoms, charges, dielectric)
    except InputError as error:
        raise InputError(*(f"{path} with {structure}: {line}" for line in error.problems)) from None


def _of_ph_x(text: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Charges (n, 3, 3) and dielectric tensor (3, 3) of a file of ph.x; None where it has none."""
    tensor = re.search(r"Dielectric Tensor:\s*\n((?:[^\n:]*\n)+?)\s*Effective Charges E-U", text)
    if tensor is None:
        return None
    blocks = re.findall(r"atom #\s*\d+\s*\n((?:[ \t]*[-+\d.Ee \t]+\n){3})", text[tensor.end() :])
    numbers = [np.array(block.split(), dtype=float) for block in (tensor[1], *blocks)]
    found = np.array([one.reshape(3, 3) for one in numbers if one.size == 9])
    return found[1:], found[0]


def _of_phonopy(atoms: Atoms, path: Path, structure: str | Path) -> tuple[np.ndarray, np.ndarray]:
    from phonopy.file_IO import parse_BORN
    from phonopy.structure.symmetry import Symmetry

    cell = phonopy_cell(atoms)
    try:
        read = parse_BORN(cell, filename=str(path))
        if read is None:  # of a phonopy of before its BORNFileParseError
            raise ValueError("its lines are not those of a BORN file")
    except (RuntimeError, ValueError) as error:
        kinds = [atoms.symbols[i] for i in Symmetry(cell).get_independent_atoms()]
        raise InputError(
            f"{path}: not the BORN file of {structure}: {one_line(error)}; it needs a line of"
            f" units, one of the dielectric tensor, and one for each of the {len(kinds)}"
            f" inequivalent atoms ({', '.join(kinds)})"
        ) from None
    return read["born"], read["dielectric"]


def born_charges(given: dict[str, str] | list[Born] | None) -> list[Born] | None:
    """What the key ``sscha.born`` stands for, its files read once: what a run depends on is their
    content. Raises ValueError."""
    if not isinstance(given, dict):
        return given
    try:
        return [read_born(structure, file) for structure, file in given.items()]
    except InputError as error:
        raise ValueError("\n".join(error.problems)) from None


BornCharges = Annotated[
    dict[InsidePath, InsidePath] | list[Born] | None,
    AfterValidator(born_charges),
    Field(
        description=(
            "Born charges for the non-analytic (LO-TO) term: {structure file: its BORN file of"
            " phonopy, or its dynamical matrix by ph.x}, used for every phase that is near one of"
            " the structures; left out: no such term"
        )
    ),
]
