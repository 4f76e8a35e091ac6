"""A campaign whose searches are stock MAGUS's, and variable composition there; skipped where MAGUS
is not installed."""

import csv

import numpy as np
import pytest
from ase.io import read
from campaign_inputs import write_campaign
from magus_run import campaign, magus, needs_magus, ours, write_input
from test_campaign_whole import SMALL

from magus_anharmonic.campaign.steps import read_records
from magus_anharmonic.hull import above_hull, reduced_formula
from magus_anharmonic.sscha.record import RANKED

pytestmark = needs_magus


def test_a_campaign_searches_with_stock_magus_and_every_step_ends(work):
    file = write_campaign(work / "study", **{**SMALL, "host": "magus"})
    result = campaign(file)
    records = read_records(file.parent / "campaign")
    other = {name: record.reason for name, record in records.items() if record.status != "done"}
    assert not other and result.returncode == 0, result.stdout[-3000:]
    for step in ("learn-075GPa", "learn-125GPa", "produce-150GPa"):
        folder = file.parent / "campaign" / step
        assert (folder / "log.txt").is_file(), "MAGUS writes log.txt, the embedded host does not"
        assert read(folder / "results/good.traj", ":")
    with (file.parent / "campaign/tables/enthalpies.csv").open(newline="") as table:
        assert {"produce", "relax", "foundation"} == {
            row["source"] for row in csv.DictReader(table)
        }

    again = campaign(file)
    assert again.returncode == 0
    assert read_records(file.parent / "campaign") == records, "nothing is done twice"


def test_variable_composition_is_ranked_by_the_hull_of_free_energies(work):
    write_input(
        work,
        formulaType="var",
        symbols=["Al", "Cu"],
        formula=[[1, 0], [0, 1]],
        full_ele=False,
        max_n_atoms=3,
        popSize=6,
        numGen=1,
        MainCalculator=ours(),
        sscha={
            "supercell": [2, 1, 1],
            "n_configs": 20,
            "max_populations": 8,
            "max_candidates": 6,
            "hessian": 0,
        },
    )
    result = magus(work, "search")
    assert result.returncode == 0, result.stdout[-3000:]
    good = read(work / "results/good.traj", ":")
    known = [atoms for atoms in good if atoms.info["status"] in RANKED]
    formulas = [atoms.get_chemical_formula() for atoms in known]
    assert len({reduced_formula(formula) for formula in formulas}) > 1
    heights = above_hull(formulas, np.array([atoms.info["gibbs"] for atoms in known]))
    assert [atoms.info["gibbs_above_hull"] for atoms in known] == pytest.approx(heights, abs=1e-6)
    order = [
        height
        for height, atoms in zip(heights, known, strict=True)
        if atoms.info["gibbs_model"] == atoms.info["model"]
    ]
    assert order == pytest.approx(sorted(order), abs=1e-9), (
        "MAGUS sorts its good population by the fitness"
    )
