"""Saddle points among the lowest phases: found by the Hessian, followed into the subgroup, and out of the ranking."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from saddle_model import HydrogenBond

from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.rank import rank
from magus_anharmonic.ranking.statics import reevaluate
from magus_anharmonic.settings import Settings, parse_settings
from magus_anharmonic.sscha.free_energy import free_energy

SADDLE, MINIMUM = HydrogenBond(-4.0, 10.0, 14.0), HydrogenBond(1.0, 8.0, 3.0)


def keys(**sscha: object) -> Settings:
    common = {"supercell": [1, 1, 1], "cell": "fixed", "n_configs": 6000, "max_populations": 12, "allocation": "fixed"}
    return parse_settings({"Fitness": ["SSCHA"], "sscha": {**common, **sscha}})


def ranked(model: HydrogenBond, folder: Path, settings: Settings, structures: list[Atoms] | None = None) -> list[Candidate]:
    population = structures or [model.crystal()]
    reevaluate(population, model, settings)
    return rank(population, evaluator=model, settings=settings, run_dir=folder, free_energy=free_energy, workers=1)


def table_of(folder: Path) -> list[dict]:
    with (folder / "ranking.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_symmetric_saddle_is_followed_and_what_lies_below_it_is_ranked(tmp_path: Path) -> None:
    follower, saddle = ranked(SADDLE, tmp_path, keys())
    assert saddle.status == "saddle" and saddle.rank_quantum is None and saddle.spg_quantum == "P4/mmm (123)"
    assert saddle.hessian_lowest < -2 * saddle.hessian_error / 2 < 0 and saddle.p_stable < 0.03
    assert (follower.rank_quantum, follower.parent, follower.spg_quantum) == (1, saddle.id, "P4mm (99)")
    assert follower.status == "stable"
    gain = (SADDLE.free_energy(symmetric=True)[0] - SADDLE.free_energy(symmetric=False)[0]) / 3
    found, error = saddle.gibbs_raw - follower.gibbs_raw, np.hypot(saddle.gibbs_error, follower.gibbs_error)
    assert gain > 5 * error and found == pytest.approx(gain, abs=4 * error)
    assert follower.id in saddle.reason and "lower" in saddle.reason
    first, second = table_of(tmp_path)
    assert (first["parent"], first["status"], second["status"]) == (saddle.id, "stable", "saddle")
    assert float(second["hessian_lowest_cm1"]) < 0 < float(first["hessian_lowest_cm1"])
