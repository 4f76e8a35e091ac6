"""Crystals that many tests and benchmarks begin with; a test that changes one takes a copy."""

import numpy as np
from ase import Atoms

NEON = Atoms("Ne", cell=[3.0] * 3, pbc=True)
PAIR = Atoms("HF", positions=[[0, 0, 0], [1.5] * 3], cell=[3.0] * 3, pbc=True)


def h3s(a=3.0, shift=0.0):
    """4 atoms, S at the corner of a bcc cell; Im-3m, or R3m when H is ``shift`` off the middle of
    its bonds (both in Angstrom)."""
    cell = 0.5 * a * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    positions = np.vstack([np.zeros(3), (0.5 * a + shift) * np.eye(3)])
    return Atoms("SH3", positions=positions, cell=cell, pbc=True)
