"""A search on a free-energy surface: who is certified by SSCHA, and how right the model was.

The model says G = (F + P V) / N of every structure and how wrong it may be. SSCHA on the potential
that it is of runs for the lowest and for all that may be lower than the lowest certified one
(`uncertified`), so that what is reported as best has been certified. Where a run ends, model and
SSCHA are asked for one structure: rms((G_SSCHA - G_model) / expected) is the model's calibration
(`calibration`), of structures that did not train it, since a run is made before any of its
populations can be a label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms

from magus_anharmonic.evaluator import Evaluator, evaluate_each
from magus_anharmonic.ranking.candidate import Candidate, by_composition
from magus_anharmonic.ranking.store import Run
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import GPa, ev_to_mev, gpa_to_ev_per_a3

if TYPE_CHECKING:
    from magus_anharmonic.potential import Potential

WITHIN = 2.0
"""Standard errors within which one candidate may be lower than another."""
CALIBRATED = (0.7, 1.4)
"""Rms of difference over expected error of a model that knows how wrong it is."""


@dataclass(frozen=True)
class Predictor:
    """A free-energy model at the pressure of a search."""

    model: Potential
    pressure: GPa

    def gibbs(self, structures: Sequence[Atoms]) -> list[tuple[float, float | None] | None]:
        """G = (F + P V) / N and its expected error (eV/atom) of each; None where there is none."""
        found = evaluate_each(self.model, [stripped(atoms) for atoms in structures])
        return [
            None
            if isinstance(one, str)
            else (self._gibbs(atoms, float(one.energy[0])), one.error_of(0))
            for atoms, one in zip(structures, found, strict=True)
        ]

    def _gibbs(self, atoms: Atoms, energy: float) -> float:
        return (energy + gpa_to_ev_per_a3(self.pressure) * atoms.get_volume()) / len(atoms)

    def predicted(self, candidates: Sequence[Candidate], potential: Evaluator) -> list[Candidate]:
        """Candidates whose enthalpy is that of this model, with it as ``gibbs_predicted`` and the
        static enthalpy of ``potential`` in its place."""
        static = evaluate_each(potential, [c.structure for c in candidates])
        return [
            replace(
                c,
                gibbs_predicted=c.enthalpy,
                gibbs_predicted_error=c.model_error,
                predicted_by=self.model.model_id,
                enthalpy=None
                if isinstance(one, str)
                else self._gibbs(c.structure, float(one.energy[0])),
                model_error=None if isinstance(one, str) else one.error_of(0),
            )
            for c, one in zip(candidates, static, strict=True)
        ]

    def at_end(self, run: Run) -> Run:
        """The run with what the model says of its centroids, in its cell."""
        if run.centroids is None:
            return run
        (found,) = self.gibbs([run.centroids])
        if found is None:
            return run
        return replace(run, predicted=found[0], predicted_error=found[1])


def uncertified(
    candidates: Sequence[Candidate], final: Callable[[Candidate], Run | None], limit: int
) -> list[Candidate]:
    """Of each composition those that may be its lowest, and have no result of SSCHA: within
    `WITHIN` expected errors of the lowest G that is known, certified or by the model. Together with
    what has a result at most ``limit``, the lowest first; none once the lowest is certified and
    nobody may be lower.

    ``final`` : the run that a candidate's run led to; None where it has none.
    """
    runs = {c.id: final(c) for c in candidates}
    wanted: list[Candidate] = []
    for block in by_composition([c for c in candidates if c.gibbs_predicted is not None]):
        open_ = [c for c in block if runs[c.id] is None]
        known = [run.free_energy for c in block if (run := runs[c.id]) is not None]
        levels = [(c.gibbs_predicted or 0.0, _error(c)) for c in open_]
        for one in known:
            if one.ranked and one.gibbs_raw is not None:
                levels.append((one.gibbs_raw, one.gibbs_error or 0.0))
        if open_:
            level, error = min(levels)
            wanted += [
                c
                for c in open_
                if (c.gibbs_predicted or 0.0) - level <= WITHIN * math.hypot(error, _error(c))
            ]
    left = max(0, limit - sum(run is not None for run in runs.values()))
    return sorted(wanted, key=lambda c: (c.gibbs_predicted or 0.0, c.id))[:left]


def _error(candidate: Candidate) -> float:
    """A model without an estimate says nothing."""
    error = candidate.gibbs_predicted_error
    return math.inf if error is None else error


@dataclass(frozen=True)
class Calibration:
    """Of ``n`` certified structures: rms of difference over expected error (None: none has both),
    and of the difference (eV/atom)."""

    n: int
    ratio: float | None
    rms: float | None

    def __str__(self) -> str:
        if self.ratio is None or self.rms is None:
            return "no certified structure tells how right the model is"
        low, high = CALIBRATED
        verdict = "" if low <= self.ratio <= high else f": not within {low:g} to {high:g}"
        return (
            f"calibration on {self.n} certified structures that did not train: SSCHA is"
            f" {ev_to_mev(self.rms):.2f} meV/atom (rms) from the model, {self.ratio:.2f} times what"
            f" is expected{verdict}"
        )


def calibration(runs: Iterable[Run]) -> Calibration:
    """Of the converged ``runs``, each counted once."""
    pairs = []
    for run in {run.folder: run for run in runs}.values():
        found = run.free_energy
        if found.converged and None not in (run.predicted, run.predicted_error, found.gibbs_raw):
            expected = math.hypot(run.predicted_error or 0.0, found.gibbs_error or 0.0)
            pairs.append(((found.gibbs_raw or 0.0) - (run.predicted or 0.0), expected))
    if not pairs:
        return Calibration(0, None, None)
    difference, expected = np.array(pairs).T
    ratio = float(np.sqrt(np.mean(np.square(difference / np.maximum(expected, 1e-9)))))
    return Calibration(len(pairs), ratio, float(np.sqrt(np.mean(np.square(difference)))))
