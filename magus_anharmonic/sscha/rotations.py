"""Molecular units that turn further than a Gaussian in Cartesian coordinates can follow.

SSCHA's density matrix (Eq. 3 of the paper) is Gaussian in Cartesian displacements: a bond that librates by a large angle is
stretched on the chord instead of turning on the arc, so the free energy of rotating H2 or CHn units comes out too high.
"""

from __future__ import annotations

import numpy as np
from vesin import NeighborList

from magus_anharmonic.sscha.state import SschaState

H2_BOND = 0.85
"""Angstrom; two hydrogen atoms closer than this are a molecule."""
CH_BOND = 1.25
"""Angstrom; hydrogen closer to carbon than this belongs to a CHn unit."""
LARGE_LIBRATION = 0.35
"""Radian (20 degrees), root mean square: the chord is then 6 % longer than the bond, more than any stretch costs."""


def librations(state: SschaState) -> list[tuple[str, float, float]]:
    """Units of the first cell with their bond (Angstrom) and rms angle of libration (radian), largest angle first.

    The angle is sqrt(<|du|^2> / 2) / bond with du the part of the relative displacement of the two atoms across the bond,
    halved for its two directions, from the covariance of the state. One entry per bond of an H2 or a C-H unit.
    """
    supercell = state.supercell
    finder = NeighborList(cutoff=max(H2_BOND, CH_BOND), full_list=True, n_threads=1)
    first, second, vectors, lengths = finder.compute(supercell.positions, supercell.cell.array, True, "ijDd")
    covariance = state.covariance.reshape(len(supercell), 3, len(supercell), 3)
    found = []
    for i, j, vector, length in zip(first.astype(int), second.astype(int), vectors, lengths, strict=True):
        symbols = supercell.symbols[i], supercell.symbols[j]
        molecule = symbols == ("H", "H") and length < H2_BOND and (i < j or j >= len(state.atoms))
        if i >= len(state.atoms) or not (molecule or (symbols == ("C", "H") and length < CH_BOND)):
            continue
        relative = covariance[i, :, i] + covariance[j, :, j] - covariance[i, :, j] - covariance[j, :, i]
        along = vector / length
        across = np.trace(relative) - along @ relative @ along
        found.append(("H2" if molecule else "C-H", float(length), float(np.sqrt(max(across, 0.0) / 2.0) / length)))
    return sorted(found, key=lambda entry: -entry[2])


def rotation_warning(state: SschaState) -> str:
    """One sentence when a unit librates by more than `LARGE_LIBRATION`, else an empty string."""
    found = librations(state)
    if not found or found[0][2] < LARGE_LIBRATION:
        return ""
    unit, bond, angle = found[0]
    many = sum(entry[2] >= LARGE_LIBRATION for entry in found)
    return f"rotating {unit} units ({many} bonds of {bond:.2f} A, libration {np.degrees(angle):.0f} degrees): G is too high"
