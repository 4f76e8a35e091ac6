"""Free energies of alike candidates from the same random numbers: their errors cancel in the difference.

All runs of a ranking draw with one seed, so that the same population of two candidates with as many atoms in the supercell are
the same normal deviates, turned into displacements by each one's own square root of the covariance. How much two free energies
have in common is measured, not assumed: by the covariance of the pairs of configurations that came from the same deviates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from magus_anharmonic.errors import DamagedFile
from magus_anharmonic.files import read_whole
from magus_anharmonic.sscha.averages import Ensemble, pair_means
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.run_folder import PROGRESS, final_populations, read_population_file, read_progress_file
from magus_anharmonic.sscha.state import SschaState

log = logging.getLogger(__name__)

SIGNIFICANT = 2.0
"""Times 1/sqrt(pairs): a smaller correlation counts as none."""


@dataclass(frozen=True)
class Draws:
    """What the populations of a run's last state say about F.

    excess : number of the population -> (n_pairs,) mean energy minus auxiliary energy of each +u/-u pair, eV/atom; size :
    coordinates of the supercell.
    """

    excess: Mapping[int, np.ndarray]
    size: int

    @property
    def n_pairs(self) -> int:
        return sum(len(values) for values in self.excess.values())


def draws_of(folder: Path) -> Draws | None:
    """Those of the run in ``folder``; None where it keeps no whole populations."""
    try:
        populations = _last_populations(folder)
    except DamagedFile as error:
        log.warning("%s; the errors of this run are taken as independent of all others", error)
        return None
    excess, size = {}, 0
    for number, (state, ensemble) in populations.items():
        u = ensemble.displacements.reshape(len(ensemble.energies), -1)
        harmonic = 0.5 * np.einsum("ci,ci->c", u @ state.full, u)
        excess[number] = pair_means(ensemble.energies - harmonic) / len(state.supercell)
        size = u.shape[1]
    return Draws(excess, size) if excess else None


def _last_populations(folder: Path) -> dict[int, tuple[SschaState, Ensemble]]:
    """By their numbers; none where one is missing. Without a whole ``progress.json``, those of the state of the result."""
    progress = read_whole(folder / PROGRESS, read_progress_file)
    if progress is not None:
        files = {number: folder / f"population_{number:03d}.npz" for number in progress["together"][-1]}
        there = all(file.is_file() for file in files.values())
        return {number: read_population_file(file) for number, file in files.items()} if there else {}
    if not (folder / "result.json").is_file():
        return {}
    return final_populations(folder, SschaResult.read(folder))


def covariance(one: Draws | None, other: Draws | None) -> float:
    """Of the two free energies, eV^2/atom^2: from the pairs with the same deviates; 0 where they have nothing in common."""
    if one is None or other is None or one.size != other.size:
        return 0.0
    pairs = [
        np.stack([one.excess[number][:n_both], other.excess[number][:n_both]])
        for number in sorted(one.excess.keys() & other.excess.keys())
        if (n_both := min(len(one.excess[number]), len(other.excess[number])))
    ]
    common = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0))
    n_common = common.shape[1]
    if n_common < 2:
        return 0.0
    moments = np.cov(common)
    if moments[0, 1] <= SIGNIFICANT / math.sqrt(n_common) * math.sqrt(moments[0, 0] * moments[1, 1]):
        return 0.0
    return float(moments[0, 1]) * n_common / one.n_pairs / other.n_pairs


def difference_error(error: float, other: float, common: float) -> float:
    """Standard error of a difference of two free energies with standard errors and a covariance."""
    return math.sqrt(max(error**2 + other**2 - 2.0 * common, 0.0))


class CommonNumbers:
    """Covariances of the free energies of runs below ``root``, their populations read once for every new one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, tuple[int, Draws | None]] = {}

    def covariance(self, folder: str, other: str) -> float:
        """Of two runs by their folders, eV^2/atom^2; 0 where one keeps no populations."""
        return covariance(self._draws(folder), self._draws(other)) if folder and other else 0.0

    def _draws(self, folder: str) -> Draws | None:
        path = self.root / folder / PROGRESS
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        if self._known.get(folder, (None, None))[0] != stamp:
            self._known[folder] = stamp, draws_of(self.root / folder)
        return self._known[folder][1]
