"""The race on the real SSCHA engine: none that is still relaxing is eliminated, isotopes,
temperatures, workers and kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from crystal_models import Crystals, crystal

from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.structures import structure_id
from magus_anharmonic.units import HBAR

PLAIN = crystal((3.0,) * 3, 1.0, 0.2, -0.3, 1.0)
WELL = crystal(
    (3.49, 3.46, 3.59),
    0.94,
    0.29,
    -0.44,
    1.33,
    well=3.72,
    wall=1.86,
    depth=0.04,
    shift=(0.0, 0.0, 0.15),
)
"""Its hydrogen lies in one of two wells, and quantum hydrogen in the middle between them."""
DEEP = crystal(
    (3.49, 3.46, 3.59),
    0.94,
    0.29,
    -0.44,
    1.33,
    well=5.5,
    wall=2.75,
    depth=0.012,
    shift=(0.0, 0.0, 0.15),
)
"""A deeper well, which takes six populations."""
RIVALS = [
    PLAIN,
    *(
        crystal((3.0 * 0.94**k,) * 3, 1.0, 0.2, -0.3, 1.0, depth=0.1 + 0.02 * k)
        for k in range(1, 5)
    ),
]


def ranked(crystals, folder, **changes):
    sscha = {
        "n_configs": 400,
        "reference_spacing": 0.1,
        "keep_best": 1,
        "hessian": 0,
        **changes.pop("sscha", {}),
    }
    settings = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": sscha})
    evaluator = changes.pop("evaluator", None) or Crystals(crystals)
    return rank_structures(
        [one.atoms for one in crystals],
        evaluator,
        settings,
        folder,
        relax=False,
        **{"workers": 1, **changes},
    )


def test_forces_and_stresses_are_the_derivatives_of_the_energy():
    rng, step = np.random.default_rng(0), 1e-5
    for one in (WELL, crystal((3.0, 3.1, 3.2), 0.9, 0.2, -0.4, 1.0, offset=(0.2, 0.1, -0.1))):
        evaluator = Crystals([one])
        atoms = one.atoms.repeat((2, 1, 2))
        atoms.positions += 0.1 * rng.normal(size=atoms.positions.shape)
        found = evaluator.evaluate([atoms])
        moved, strained = [], []
        for sign in (1.0, -1.0):
            moved.append(atoms.copy())
            moved[-1].positions[3, 1] += sign * step
            strained.append(atoms.copy())
            strain = np.eye(3) + sign * step * (np.eye(3)[[1, 0, 2]] - np.diag([0.0, 0.0, 1.0]))
            strained[-1].set_cell(atoms.cell.array @ strain, scale_atoms=True)
        up, down = evaluator.evaluate(moved).energy
        assert found.forces[0][3, 1] == pytest.approx(-(up - down) / (2 * step), abs=1e-7)
        up, down = evaluator.evaluate(strained).energy
        assert found.stress[0][0, 1] == pytest.approx(
            (up - down) / (4 * step * atoms.get_volume()), abs=1e-7
        )


@pytest.mark.slow
def test_a_candidate_that_falls_far_from_its_double_well_wins_the_race(tmp_path):
    """Its first populations lie far above the end of the others; a race by G alone would have
    thrown it out."""
    table = ranked([*RIVALS, DEEP], tmp_path)
    well, plain = structure_id(DEEP.atoms), structure_id(PLAIN.atoms)
    found = {candidate.id: candidate for candidate in table}
    first = np.genfromtxt(
        tmp_path / "sscha" / found[well].sscha_folder / "convergence.csv", delimiter=",", names=True
    )
    gibbs, errors = first["gibbs_eV_per_atom"], first["error_eV_per_atom"]
    rival = found[plain].free_energy.gibbs_raw
    assert gibbs[0] - 4.0 * errors[0] > rival + 0.01 and gibbs[1] - 4.0 * errors[1] > rival, (
        "far above: else this tests nothing"
    )
    assert table[0].id == well and table[0].status == "converged"
    assert found[well].free_energy.gibbs_raw < rival < gibbs[1]
    assert all(
        found[structure_id(one.atoms)].free_energy.n_evaluations
        < found[well].free_energy.n_evaluations
        for one in RIVALS
    ), "effort goes where it is needed"


@pytest.mark.full
def test_a_new_model_takes_over_the_runs_of_the_old_one_and_asks_for_less(tmp_path):
    """Models of one crystal that differ as two generations do; the second ranking goes on where the
    first ended."""
    after = [
        crystal((3.0,) * 3, 1.0, 0.2, -0.28, 1.05),
        crystal(
            (3.49, 3.46, 3.59),
            0.94,
            0.29,
            -0.43,
            1.36,
            well=5.4,
            wall=2.75,
            depth=0.012,
            shift=(0.0, 0.0, 0.15),
        ),
    ]
    options = {"sscha": {"allocation": "fixed"}}
    old, new, anew = Crystals([PLAIN, DEEP], "old"), Crystals(after, "new"), Crystals(after, "new")
    ranked([PLAIN, DEEP], tmp_path / "a", evaluator=old, **options)
    found = ranked(after, tmp_path / "a", evaluator=new, **options)
    alone = ranked(after, tmp_path / "b", evaluator=anew, **options)
    assert new.n_structures < 0.75 * anew.n_structures
    assert [c.id for c in found] == [c.id for c in alone] and all(
        c.status == "converged" and c.model == "new" for c in found
    )
    for one, other in zip(found, alone, strict=True):
        assert one.gibbs == pytest.approx(
            other.gibbs, abs=4.0 * np.hypot(one.gibbs_error, other.gibbs_error) + 4e-4
        )
    spent = new.n_structures
    assert [c.gibbs for c in ranked(after, tmp_path / "a", evaluator=new, **options)] == [
        c.gibbs for c in found
    ]
    assert new.n_structures == spent + len(after), (
        "only the static energies of the table are asked again"
    )


@pytest.mark.parametrize("temperature", [0.0, pytest.param(300.0, marks=pytest.mark.full)])
def test_heavy_hydrogen_needs_two_populations_from_light(temperature):
    evaluator = Crystals([PLAIN, WELL])
    options = dict(temperature=temperature, n_configs=1000, reference_spacing=0.1)
    for one in (PLAIN, WELL):
        light = free_energy(one.atoms, evaluator, **options)
        heavy = free_energy(
            one.atoms, evaluator, masses={"H": 2.014}, start=light, seed=1, **options
        )
        anew = free_energy(one.atoms, evaluator, masses={"H": 2.014}, seed=2, **options)
        assert light.converged and heavy.converged and anew.converged
        assert heavy.n_populations <= 2
        assert heavy.gibbs < light.gibbs - 0.005
        assert heavy.gibbs == pytest.approx(
            anew.gibbs, abs=4.0 * np.hypot(heavy.gibbs_error, anew.gibbs_error) + 2e-4
        )
        assert sorted(heavy.state.supercell.get_masses())[0] == 2.014
        assert heavy.volume < light.volume * 1.002


@pytest.mark.full
def test_d3s_needs_two_populations_from_h3s(h3s):
    """Im-3m at 150 GPa with the shipped checkpoint; the cell of H3S is a GPa or two off for D3S."""
    from magus_anharmonic.potential import load

    potential = load("h3s-gpaw-small", device="cpu")
    options = dict(pressure=150.0, temperature=0.0, n_configs=60, reference_spacing=0.1)
    light = free_energy(h3s(3.03), potential, max_populations=12, **options)
    heavy = free_energy(
        h3s(3.03), potential, max_populations=4, masses={"H": 2.014}, start=light, seed=1, **options
    )
    assert light.converged and heavy.converged
    assert heavy.n_populations == 2 and heavy.space_group == "Im-3m (229)"
    assert 0.03 < light.gibbs - heavy.gibbs < 0.09, (
        "0.3 of the zero-point energy of three H, per atom"
    )


def test_nothing_of_the_light_mass_is_left_in_the_heavy_crystal(tmp_path):
    """One population from light hydrogen's state: the same force constants, frequencies lower by
    the masses alone."""
    evaluator = Crystals([PLAIN])
    options = dict(n_configs=200, reference_spacing=0.1, cell="fixed")
    light = free_energy(PLAIN.atoms, evaluator, directory=tmp_path / "H", **options)
    for start in (light, tmp_path / "H", tmp_path / "H" / f"dyn_pop{light.n_populations}_"):
        heavy = free_energy(
            PLAIN.atoms, evaluator, masses={"H": 2.014}, start=start, max_populations=1, **options
        )
        assert np.allclose(heavy.force_constants, light.force_constants, atol=1e-5)
        masses = heavy.state.supercell.get_masses()
        assert sorted(set(masses)) == [2.014, 6.94]
        root = np.repeat(np.sqrt(masses), 3)
        squares = np.linalg.eigvalsh(heavy.state.full / np.outer(root, root))[3:]
        assert np.allclose(np.sort(heavy.state.modes.hbar_omega), HBAR * np.sqrt(squares))
        variance = (
            np.diag(heavy.state.covariance)[3:6].mean()
            / np.diag(light.state.covariance)[3:6].mean()
        )
        assert 0.68 < variance < 0.78, "1/sqrt(2) for hydrogen between heavy neighbours"


@pytest.mark.slow
def test_a_list_of_temperatures_feeds_one_start_to_the_next(tmp_path):
    table = ranked(
        [PLAIN, WELL],
        tmp_path,
        sscha={
            "temperature": [0.0, 150.0, 300.0],
            "keep_best": 2,
            "n_configs": 1000,
            "error_tolerance": 1e-3,
        },
    )
    rows = {
        t: np.genfromtxt(tmp_path / name, delimiter=",", names=True, dtype=None, encoding=None)
        for t, name in NAMES.items()
    }
    assert [str(row["status"]) for t in NAMES for row in rows[t]] == ["converged"] * 6
    populations = sorted(
        len(list(folder.glob("population_*.npz"))) for folder in (tmp_path / "sscha").iterdir()
    )
    assert len(populations) == 6 and populations[3] == 2, "two populations do at 150 and 300 K"
    for candidate in table:
        falling = [
            row["gibbs_eV_per_atom"] for t in NAMES for row in rows[t] if row["id"] == candidate.id
        ]
        assert len(falling) == 3 and falling[2] < falling[1] < falling[0] + 5e-4


NAMES = {0.0: "ranking.csv", 150.0: "ranking_150K.csv", 300.0: "ranking_300K.csv"}

RACE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_race import RIVALS, WELL, Recording, ranked

if __name__ == "__main__":
    ranked([*RIVALS[:3], WELL], Path({folder!r}), evaluator=Recording([*RIVALS[:3], WELL], {calls!r}), workers=1)
"""


class Recording(Crystals):
    """Leaves a line per large call, and takes its time."""

    def __init__(self, crystals, calls):
        super().__init__(crystals)
        self.calls = calls

    def evaluate(self, structures):
        """See `Evaluator`."""
        from magus_anharmonic.io.files import append_jsonl

        if len(structures) >= 100:
            append_jsonl(Path(self.calls), {"n": len(structures)})
            time.sleep(0.3)
        return super().evaluate(structures)


@pytest.mark.full
def test_one_worker_two_workers_and_a_killed_race_give_the_same_table(tmp_path):
    crystals = [*RIVALS[:3], WELL]
    ranked(crystals, tmp_path / "one")
    expected = (tmp_path / "one" / "ranking.csv").read_bytes()
    ranked(crystals, tmp_path / "two", workers=2)
    assert (tmp_path / "two" / "ranking.csv").read_bytes() == expected

    killed, calls = tmp_path / "killed", tmp_path / "calls.jsonl"
    script = tmp_path / "script.py"
    script.write_text(
        RACE.format(tests=str(Path(__file__).parent), folder=str(killed), calls=str(calls))
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    end = time.monotonic() + 300
    while len(read_jsonl(calls)) < 7:
        assert process.poll() is None and time.monotonic() < end, (
            "it must be killed in the second round"
        )
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (killed / "ranking.csv").exists()
    done = len(list(killed.glob("sscha/*/population_*.npz")))
    assert done >= 6
    evaluator = Crystals(crystals)
    ranked(crystals, killed, evaluator=evaluator)
    assert (killed / "ranking.csv").read_bytes() == expected
    whole = Crystals(crystals)
    ranked(crystals, tmp_path / "again", evaluator=whole)
    assert evaluator.n_structures < whole.n_structures - 500, (
        "what was finished before the kill is not evaluated again"
    )
