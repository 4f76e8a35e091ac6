"""Finite-size term: the auxiliary harmonic free energy on a fine q mesh minus that of the supercell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.geometry import minkowski_reduce

from magus_anharmonic.sscha.state import SschaState, oscillator_free_energy
from magus_anharmonic.sscha.supercells import Repeats, Three, cell_offsets, containing_mesh, supercell_matrix, three
from magus_anharmonic.units import HBAR

CHUNK = 2048


@dataclass(frozen=True)
class FiniteSize:
    """term : eV per primitive cell, added to F; mesh : q points; imaginary : part of interpolated modes below zero."""

    term: float
    mesh: Three
    imaginary: float


def reference_mesh(atoms: Atoms, spacing: float, repeats: Repeats) -> Three:
    """Gamma-centred mesh with at most ``spacing`` (2 pi / A) between points, never coarser than the supercell's."""
    lengths = np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
    return three(max(np.ceil(length / spacing - 1e-6), n) for length, n in zip(lengths, containing_mesh(repeats), strict=True))


def finite_size_term(state: SschaState, spacing: float) -> FiniteSize:
    """Fourier interpolation of the force constants with shared nearest images (Wigner-Seitz cell of the supercell).

    An imaginary interpolated mode enters with the size of its frequency, and is counted. The three translations at
    Gamma are left out, as in the supercell. Long-range dipoles (LO-TO splitting) are not added.
    """
    mesh = reference_mesh(state.atoms, spacing, state.repeats)
    grid = np.array(list(np.ndindex(*mesh))) / np.array(mesh)
    vectors, blocks = nearest_images(state)
    total, imaginary = 0.0, 0
    for begin in range(0, len(grid), CHUNK):
        squares = interpolated_squares(state, vectors, blocks, grid[begin : begin + CHUNK]).ravel()
        if begin == 0:
            squares = squares[3:]
        imaginary += int((squares <= 0).sum())
        quantum = HBAR * np.sqrt(np.abs(squares))
        total += float(oscillator_free_energy(quantum[quantum > 1e-6], state.temperature).sum())
    n_modes = len(grid) * 3 * len(state.atoms) - 3
    return FiniteSize(total / len(grid) - state.harmonic_free_energy, mesh, imaginary / n_modes)


def nearest_images(state: SschaState) -> tuple[np.ndarray, np.ndarray]:
    """Lattice vectors (m, 3) and blocks (m, n, n, 3, 3): every pair's block shared among its nearest images."""
    cell = state.atoms.cell.array
    # of a reduced basis, whose nearest images are within two shells
    periods = supercell_matrix(state.repeats)
    periods = np.rint(minkowski_reduce(periods @ cell)[1] @ periods).astype(int)
    offsets = cell_offsets(state.repeats)
    shells = np.array(list(np.ndindex(5, 5, 5))) - 2
    candidates = offsets[:, None] + (shells @ periods)[None]
    between = state.atoms.positions[None] - state.atoms.positions[:, None]
    distances = np.linalg.norm((candidates @ cell)[:, :, None, None] + between[None, None], axis=-1)
    near = distances < distances.min(axis=1, keepdims=True) + 1e-3
    weights = near / near.sum(axis=1, keepdims=True)
    flat = candidates.reshape(-1, 3)
    blocks = (weights[..., None, None] * state.force_constants[:, None]).reshape(len(flat), *state.force_constants.shape[1:])
    used = weights.reshape(len(flat), -1).any(axis=1)
    return flat[used], blocks[used]


def interpolated_squares(state: SschaState, vectors: np.ndarray, blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Eigenvalues (n_q, 3n) of the dynamical matrix at fractional ``q``, ascending, eV/A^2/amu."""
    size = 3 * len(state.atoms)
    root = np.sqrt(np.repeat(state.atoms.get_masses(), 3))
    flat = blocks.transpose(0, 1, 3, 2, 4).reshape(len(vectors), -1)
    matrices = (np.exp(2j * np.pi * q @ vectors.T) @ flat).reshape(-1, size, size)
    matrices = 0.5 * (matrices + matrices.conj().transpose(0, 2, 1)) / np.outer(root, root)
    return np.linalg.eigvalsh(matrices)
