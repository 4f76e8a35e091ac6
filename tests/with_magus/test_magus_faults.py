"""Faults of MAGUS 2.0.1 that this package works round, each shown in MAGUS's own code, and what ours does instead."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from magus_run import needs_magus, ours

pytestmark = needs_magus


@pytest.fixture
def magus_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MAGUS's calculators take the working directory as theirs."""
    monkeypatch.chdir(work)
    return work


def test_a_failed_single_point_keeps_the_energy_of_another_structure_there_and_not_here(magus_folder: Path) -> None:
    from magus.calculators.emt import EMTCalculator

    from magus_anharmonic.plugins.calculator import MatterSimCalculator

    wrong = bulk("Fe")
    wrong.info.update(energy=-99.0, forces=np.zeros((1, 3)), stress=np.zeros(6), enthalpy=-99.0)
    stock = EMTCalculator(jobPrefix="EMT", job_prefix="EMT", workDir=str(magus_folder), work_dir=str(magus_folder), pressure=0)
    (returned,) = stock.scf([wrong.copy()])
    assert returned.info["energy"] == -99.0, "EMT has no iron; MAGUS hands the old number back"

    calculator = MatterSimCalculator(**ours(), MainCalculator=ours(), pressure=0, workDir=str(magus_folder), work_dir=str(magus_folder))
    hopeless = bulk("Al")
    hopeless.info.update(energy=-99.0)
    hopeless.positions[:] = np.nan
    assert calculator.scf([hopeless]) == [] and "energy" not in hopeless.info


def test_two_calculators_of_one_name_overwrite_each_other_there_and_ours_stays(magus_folder: Path) -> None:
    import magus.calculators
    from magus.utils import CALCULATOR_PLUGIN

    from magus_anharmonic import plugins

    plugins.register()
    CALCULATOR_PLUGIN.register("mattersim")(dict)
    assert CALCULATOR_PLUGIN["mattersim"] is dict, "MAGUS overwrites without a word"
    magus.calculators.load_plugins(magus.calculators.__file__, "magus.calculators")
    assert CALCULATOR_PLUGIN["mattersim"] is plugins.mattersim


@pytest.mark.parametrize("name", ["gpmin", "scipyfminbfgs", "scipyfmincg"])
def test_optimisers_that_kill_a_search_there_are_refused_at_the_start_here(magus_folder: Path, name: str) -> None:
    from magus.calculators.emt import EMTCalculator

    from magus_anharmonic.errors import InputError
    from magus_anharmonic.settings import parse_settings

    stock = EMTCalculator(
        jobPrefix="EMT", job_prefix="EMT", workDir=str(magus_folder), work_dir=str(magus_folder), pressure=0, optimizer=name
    )
    with pytest.raises(TypeError, match="maxstep"):
        stock.relax([bulk("Al", a=4.2)])
    with pytest.raises(InputError, match="optimizer"):
        parse_settings({"MainCalculator": ours(optimizer=name)})


def test_a_list_of_prefixes_builds_a_calculator_that_cannot_learn_there_and_is_refused_here() -> None:
    from magus.calculators.base import AdjointCalculator

    from magus_anharmonic.errors import InputError
    from magus_anharmonic.settings import parse_settings

    assert not hasattr(AdjointCalculator, "select") and not hasattr(AdjointCalculator, "train")
    with pytest.raises(InputError, match="must be one name, not a list"):
        parse_settings({"MLCalculator": ours(jobPrefix=["A", "B"])})


def test_shallow_copies_share_their_arrays_there_so_the_ranking_keeps_structures_of_its_own(tmp_path: Path) -> None:
    """MAGUS's ``addSym`` standardises members of the keep population in place, and they are shallow copies of good ones."""
    from magus.populations.individuals import Bulk

    assert "add_symmetry" in dir(Bulk)
    good = bulk("Al", a=4.0)
    good.info["free_energy"] = -1.0
    keep = copy.copy(good)
    keep.positions += 0.3
    assert (good.positions == keep.positions).all() and good.info["free_energy"] == -1.0, "moved, and its number stays"

    from magus_anharmonic.ranking.store import FreeEnergyStore, Key, Record
    from magus_anharmonic.structures import structure_id

    start = bulk("Al", a=4.0)
    key = Key("m", 0.0, 0.0, "s")
    FreeEnergyStore(tmp_path / "x.db").put(Record(structure_id(start), key, start, "sscha", "", gibbs=-1.0, centroids=start.copy()))
    start.positions += 0.3
    stored = FreeEnergyStore(tmp_path / "x.db").get(structure_id(bulk("Al", a=4.0)), key)
    assert np.allclose(stored.start.positions, 0.0)
