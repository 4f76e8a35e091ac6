"""How far atoms stray from their centroids, in distances between atoms (Lindemann's ratio): a Gaussian that wide is no crystal.

The ratio is sqrt(<|u|^2>) of an atom over the distance of neighbours in a close packing of the same density, 2^(1/6) (V/N)^(1/3):
the shortest bond would not do, because the atoms of a molecule stray by much of it together. Crystals melt at ratios about 0.1, the
most quantum ones at up to 0.3, helium at 0 K included (Dusseault, Boninsegni, arXiv:1612.08006, and what they cite). So a ratio
above 0.3 is beyond any crystal, whatever moves the atoms; and thermal motion alone, that is what is above the zero-point part, beyond
0.15 is where classical crystals are liquid: superheated at best, and said so.
"""

from __future__ import annotations

import numpy as np

from magus_anharmonic.sscha.state import SschaState, variance

MELTED = 0.3
"""Ratio beyond which a state is no crystal."""
THERMAL = 0.15
"""The same of the thermal part alone, beyond which a classical crystal has melted."""
CLOSE_PACKING = 2.0 ** (1.0 / 6.0)


def lindemann_ratios(state: SschaState) -> tuple[np.ndarray, np.ndarray]:
    """(n,) ratio of every atom of the cell, and (n,) its thermal part: the root of what <|u|^2> is above that at 0 K."""
    modes, n_cells = state.modes, state.n_cells
    weights = (modes.vectors**2).reshape(n_cells, len(state.atoms), 3, -1).sum(axis=2).mean(axis=0) / state.atoms.get_masses()[:, None]
    square = weights @ variance(modes.quantum, state.temperature)
    at_rest = weights @ variance(modes.quantum, 0.0)
    distance = CLOSE_PACKING * (state.atoms.get_volume() / len(state.atoms)) ** (1.0 / 3.0)
    return np.sqrt(square) / distance, np.sqrt(np.maximum(square - at_rest, 0.0)) / distance


def melted(state: SschaState) -> str:
    """Why the state is no crystal; empty when it may be one."""
    ratios, _ = lindemann_ratios(state)
    worst = _beyond(ratios, MELTED)
    if worst is None:
        return ""
    atom = f"atom {worst + 1} ({state.atoms.symbols[worst]})"
    return f"melted: {atom} {_strays(ratios[worst])} (limit {MELTED:g})"


def melting_warning(state: SschaState) -> str:
    """One sentence when thermal motion is that of a liquid, else an empty string."""
    _, thermal = lindemann_ratios(state)
    worst = _beyond(thermal, THERMAL)
    if worst is None:
        return ""
    return f"may have melted: {state.atoms.symbols[worst]} {_strays(thermal[worst])} by thermal motion alone (limit {THERMAL:g})"


def _beyond(ratios: np.ndarray, limit: float) -> int | None:
    """The atom of the largest ratio, where that is above the limit."""
    worst = int(np.argmax(ratios))
    return worst if ratios[worst] > limit else None


def _strays(ratio: float) -> str:
    return f"strays by {ratio:.2f} of the distance between atoms"
