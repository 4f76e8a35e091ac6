"""Two harmonic crystals, a model and a reference, between which every error of the SSCHA is a
closed expression."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms

from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.paper.ensemble_labels import Labelled, sample_displacements
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.state import SschaState, displaced, expand, fold
from magus_anharmonic.sscha.symmetry import Symmetry


@dataclass(frozen=True)
class HarmonicCrystal:
    """E = constant + 1/2 (u - shift) K (u - shift) per supercell about the centroids of ``state``;
    ``shift`` (n, 3) A, in every cell.

    ``noise`` (eV) adds a smooth, even, configuration-dependent term to the energy alone: an error
    that no gradient sees.
    """

    state: SschaState
    shift: np.ndarray
    constant: float = 0.0
    noise: float = 0.0
    model_id: str = "harmonic-crystal"

    def evaluate(self, structures):
        matrix = expand(self.state.force_constants, self.state.supercell_matrix)
        u = (
            np.array([atoms.positions for atoms in structures])
            - self.state.supercell.positions
            - np.tile(self.shift, (self.state.n_cells, 1))
        )
        flat = u.reshape(len(u), -1)
        forces = -flat @ matrix
        energies = self.constant * self.state.n_cells - 0.5 * np.einsum("ci,ci->c", flat, forces)
        if self.noise:
            energies = energies + self.noise * np.cos(40.0 * (u[:, 0, 0] + 0.7 * u[:, -1, 1]))
        return Evaluation(energies, list(forces.reshape(u.shape)), np.zeros((len(u), 3, 3)))

    @property
    def free_energy(self):
        """Exact, eV per primitive cell."""
        return self.constant + self.state.harmonic_free_energy


def crystal(supercell_matrix=(2, 1, 1), temperature=0.0, seed=1):
    """Three atoms without symmetry on random, stable springs that obey the acoustic sum rule."""
    atoms = Atoms(
        "SH2",
        positions=[[0, 0, 0], [1.9, 1.8, 0.2], [0.1, 1.9, 2.0]],
        cell=[[3.8, 0, 0], [0.3, 3.9, 0], [0, 0.4, 4.0]],
        pbc=True,
    )
    return replace(
        SschaState(atoms, supercell_matrix, np.zeros((2, 3, 3, 3, 3)), temperature),
        force_constants=springs(atoms, supercell_matrix, seed),
    )


def springs(atoms, supercell_matrix, seed, scale=1.0):
    """Compact force constants of random positive springs, translations free."""
    rng = np.random.default_rng(seed)
    n_cells, n = int(np.prod(supercell_matrix)), len(atoms)
    root = rng.normal(size=(3 * n * n_cells, 3 * n * n_cells))
    full = root @ root.T / (3 * n * n_cells) + 2.0 * np.eye(3 * n * n_cells)
    return scale * Symmetry(atoms, supercell_matrix).force_constants(fold(full, supercell_matrix))


def labelled(model, reference, n_configs, seed=0):
    """Both evaluated on an ensemble of the model's own state."""
    state = model.state
    u = sample_displacements(state, n_configs, seed)

    def ensemble(source):
        found = source.evaluate(displaced(state, u))
        return Ensemble(u, found.energy, np.array(found.forces), found.stress)

    centroid = tuple(source.evaluate([state.supercell]).forces[0] for source in (reference, model))
    return Labelled(state, ensemble(reference), ensemble(model), centroid)  # type: ignore[arg-type]


def pair(strength, *, supercell_matrix=(2, 1, 1), noise=0.0):
    """A model, and a reference whose minimum is shifted and whose springs differ, both in
    proportion to ``strength``."""
    state = crystal(supercell_matrix)
    rng = np.random.default_rng(7)
    shift = 0.05 * strength * rng.normal(size=(len(state.atoms), 3))
    other = springs(state.atoms, supercell_matrix, seed=9) - 0.9 * state.force_constants
    softer = replace(state, force_constants=state.force_constants + strength * other)
    model = HarmonicCrystal(state, np.zeros_like(shift), constant=-3.0)
    return model, HarmonicCrystal(softer, shift - shift.mean(axis=0), constant=-3.1, noise=noise)
