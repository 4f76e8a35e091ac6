"""Signs that a state means something else: melting, rotating units.

How far atoms stray from their centroids is measured in distances between atoms (Lindemann's ratio):
sqrt(<|u|^2>) of an atom over the distance of neighbours in a close packing of the same density,
2^(1/6) (V/N)^(1/3). The shortest bond would not do, because the atoms of a molecule stray by much
of it together. Crystals melt at ratios about 0.1, the most quantum ones at up to 0.3, helium at 0 K
included (Dusseault, Boninsegni, arXiv:1612.08006, and what they cite). So a ratio above 0.3 is
beyond any crystal, whatever moves the atoms; and thermal motion alone, that is what is above the
zero-point part, beyond 0.15 is where classical crystals are liquid: superheated at best, and said
so.

SSCHA's density matrix (Eq. 3 of the paper) is Gaussian in Cartesian displacements: a bond that
librates by a large angle is stretched on the chord instead of turning on the arc, so the free
energy of rotating H2 or CHn units comes out too high.
"""

from __future__ import annotations

import numpy as np
from vesin import NeighborList

from magus_anharmonic.sscha.state import SschaState, variance

MELTED = 0.3
"""Ratio beyond which a state is no crystal."""
THERMAL = 0.15
"""The same of the thermal part alone, beyond which a classical crystal has melted."""
CLOSE_PACKING = 2.0 ** (1.0 / 6.0)


def lindemann_ratios(state: SschaState) -> tuple[np.ndarray, np.ndarray]:
    """(n,) ratio of every atom of the cell, and (n,) its thermal part: the root of what <|u|^2> is
    above that at 0 K."""
    modes, n_cells = state.modes, state.n_cells
    weights = (modes.vectors**2).reshape(n_cells, len(state.atoms), 3, -1).sum(axis=2).mean(
        axis=0
    ) / state.atoms.get_masses()[:, None]
    square = weights @ variance(modes.hbar_omega, state.temperature)
    at_rest = weights @ variance(modes.hbar_omega, 0.0)
    distance = CLOSE_PACKING * (state.atoms.get_volume() / len(state.atoms)) ** (1.0 / 3.0)
    return np.sqrt(square) / distance, np.sqrt(np.maximum(square - at_rest, 0.0)) / distance


def melted(state: SschaState) -> str:
    """Why the state is no crystal; empty when it may be one."""
    ratios, _ = lindemann_ratios(state)
    worst = int(np.argmax(ratios))
    if ratios[worst] <= MELTED:
        return ""
    atom = f"atom {worst + 1} ({state.atoms.symbols[worst]})"
    return f"melted: {atom} strays by {_distances(ratios[worst])} (limit {MELTED:g})"


def melting_warning(state: SschaState) -> str:
    """One sentence when thermal motion is that of a liquid, else an empty string."""
    _, thermal = lindemann_ratios(state)
    worst = int(np.argmax(thermal))
    if thermal[worst] <= THERMAL:
        return ""
    strays = f"{state.atoms.symbols[worst]} strays by {_distances(thermal[worst])}"
    return f"may have melted: {strays} by thermal motion alone (limit {THERMAL:g})"


def _distances(ratio: float) -> str:
    return f"{ratio:.2f} of the distance between atoms"


H2_BOND = 0.85
"""Angstrom; two hydrogen atoms closer than this are a molecule."""
CH_BOND = 1.25
"""Angstrom; hydrogen closer to carbon than this belongs to a CHn unit."""
LARGE_LIBRATION = 0.35
"""Radian (20 degrees), root mean square: the chord is then 6 % longer than the bond, more than any
stretch costs."""


def librations(state: SschaState) -> list[tuple[str, float, float]]:
    """Units of the first cell with their bond (Angstrom) and rms angle of libration (radian),
    largest angle first.

    The angle is sqrt(<|du|^2> / 2) / bond with du the part of the relative displacement of the two
    atoms across the bond, halved for its two directions, from the covariance of the state. One
    entry per bond of an H2 or a C-H unit.
    """
    supercell = state.supercell
    finder = NeighborList(cutoff=max(H2_BOND, CH_BOND), full_list=True, n_threads=1)
    first, second, vectors, lengths = finder.compute(
        supercell.positions, supercell.cell.array, True, "ijDd"
    )
    covariance = state.covariance.reshape(len(supercell), 3, len(supercell), 3)
    found = []
    for i, j, vector, length in zip(
        first.astype(int), second.astype(int), vectors, lengths, strict=True
    ):
        symbols = supercell.symbols[i], supercell.symbols[j]
        molecule = symbols == ("H", "H") and length < H2_BOND and (i < j or j >= len(state.atoms))
        if i >= len(state.atoms) or not (molecule or (symbols == ("C", "H") and length < CH_BOND)):
            continue
        relative = (
            covariance[i, :, i] + covariance[j, :, j] - covariance[i, :, j] - covariance[j, :, i]
        )
        along = vector / length
        across = np.trace(relative) - along @ relative @ along
        found.append(
            (
                "H2" if molecule else "C-H",
                float(length),
                float(np.sqrt(max(across, 0.0) / 2.0) / length),
            )
        )
    return sorted(found, key=lambda entry: -entry[2])


def rotation_warning(state: SschaState) -> str:
    """One sentence when a unit librates by more than `LARGE_LIBRATION`, else an empty string."""
    found = librations(state)
    if not found or found[0][2] < LARGE_LIBRATION:
        return ""
    unit, bond, angle = found[0]
    many = sum(entry[2] >= LARGE_LIBRATION for entry in found)
    return (
        f"rotating {unit} units ({many} bonds of {bond:.2f} A, libration {np.degrees(angle):.0f}"
        " degrees): G is too high"
    )
