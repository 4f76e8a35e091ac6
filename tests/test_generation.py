"""After each round of a search: learn, re-evaluate, rank, hand back seeds; the same for MAGUS and
the embedded host."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import ranking_fakes as fakes
from ase import Atoms
from ase.build import bulk

from magus_anharmonic import generation as rounds
from magus_anharmonic.errors import InputError, LabelerNotInstalled, MagusAnharmonicError
from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.generation import SearchState, after_generation, newest_checkpoint, start
from magus_anharmonic.io.files import append_jsonl, read_jsonl
from magus_anharmonic.ranking.fitness import fitness_values
from magus_anharmonic.ranking.structures import reevaluate
from magus_anharmonic.settings import parse_settings

LEARNING = {"labeler": {"calculator": "gpaw"}, "target_rmse": 0.01}


def search_settings(pressure=0.0, **keys):
    base = {
        "pressure": pressure,
        "Fitness": ["SSCHA"],
        "sscha": {},
        "numGen": 3,
        "MainCalculator": {"calculator": "mattersim"},
    }
    return parse_settings({**base, **keys})


def state_of(folder, keys, evaluator=None, fake=fakes.shifted, **fields):
    values = {
        "n_generations": keys.num_gen,
        "learn": False,
        "free_energy": fake,
        "workers": 1,
        "relaxation_steps": 0,
        **fields,
    }
    return SearchState(keys, folder, evaluator or fakes.Emt(), 7, **values)


def calls(folder):
    return read_jsonl(folder / "calls.jsonl")


@dataclass
class Deeper(fakes.Emt):
    """EMT with every atom lower by ``depth``: a model after learning."""

    model_id: str = "learned"
    depth: float = 1.0

    def evaluate(self, structures):
        found = super().evaluate(structures)
        return Evaluation(
            found.energy - self.depth * np.array([len(a) for a in structures]),
            found.forces,
            found.stress,
        )


@dataclass
class Teacher:
    """Stands for `learn`: notes what it was given, returns ``potential``."""

    potential: Any
    rmse: float = 0.02
    given: list[Atoms] = field(default_factory=list)
    n_calls: int = 0

    def __call__(self, population, **options):
        self.given, self.n_calls = population, self.n_calls + 1
        metrics = {"new": {"validation": {"energy_rmse": self.rmse}}}
        return type("Learned", (), {"potential": self.potential, "metrics": metrics})()


@pytest.fixture
def teach(monkeypatch):
    import magus_anharmonic.learning.learn as module

    def install(teacher):
        monkeypatch.setattr(module, "learn", teacher)
        return teacher

    return install


# ---------------------------------------------------------------------------------------- the round


def test_survivors_carry_numbers_of_the_new_model_alone(tmp_path, teach):
    keys = search_settings(pressure=5.0, learning=LEARNING)
    structures = [bulk("Cu"), bulk("Al")]
    reevaluate(structures, fakes.Emt("old"), keys)
    before = [atoms.info["enthalpy"] for atoms in structures]
    teacher = teach(Teacher(Deeper()))
    state = state_of(tmp_path, keys, fakes.Emt("old"), learn=True, labeler="some", store="some")
    population = [*structures, structures[0].copy()]
    after_generation(state, population, structures, 1)
    assert len(teacher.given) == 3
    assert state.potential.model_id == "learned"
    assert state.energy_rmse == 0.02
    for atoms, old in zip(structures, before, strict=True):
        assert atoms.info["model"] == "learned"
        assert atoms.info["enthalpy"] == pytest.approx(old - 1.0)
        assert atoms.info["energy"] == pytest.approx(
            (atoms.info["enthalpy"] - 5.0 / 160.21766 * atoms.get_volume()), abs=1e-6
        )
        assert atoms.info["forces"].shape == (1, 3)
        assert atoms.info["stress"].shape == (6,)


def test_sscha_starts_when_the_model_has_converged(tmp_path, teach):
    keys = search_settings(learning=LEARNING)
    state = state_of(tmp_path, keys, learn=True, labeler="some", store="some")
    for generation, rmse, expected in ((1, 0.02, 0), (2, 0.009, 1)):
        teach(Teacher(fakes.Emt(), rmse=rmse))
        after_generation(state, [bulk("Cu")], [bulk("Cu")], generation)
        assert len(calls(tmp_path)) == expected


def test_sscha_runs_in_the_last_round_whatever_the_model(tmp_path, teach):
    teach(Teacher(fakes.Emt(), rmse=0.5))
    keys = search_settings(learning=LEARNING)
    state = state_of(tmp_path, keys, learn=True, labeler="some", store="some")
    after_generation(state, [bulk("Cu")], [bulk("Cu")], 3)
    assert len(calls(tmp_path)) == 1
    after_generation(state, [bulk("Al")], [bulk("Al")], 1, last=True)
    assert len(calls(tmp_path)) == 2


def test_structures_of_an_older_model_are_relaxed_and_those_of_this_model_stay(tmp_path):
    keys = search_settings()
    stretched = [bulk("Cu", a=3.75), bulk("Cu", a=3.75)]
    reevaluate(stretched, fakes.Emt("old"), keys)
    stretched[1].info["model"] = "emt"
    reevaluate(stretched, fakes.Emt(), keys, relaxation_steps=60)
    relaxed, kept = (atoms.get_volume() for atoms in stretched)
    assert kept == pytest.approx(3.75**3 / 4)
    assert relaxed == pytest.approx(3.59**3 / 4, rel=0.02)
    assert stretched[0].info["enthalpy"] < stretched[1].info["enthalpy"]


def test_a_survivor_that_cannot_be_evaluated_ends_nothing(tmp_path):
    class NoGold(fakes.Emt):
        def evaluate(self, structures):
            if any("Au" in atoms.get_chemical_symbols() for atoms in structures):
                raise MagusAnharmonicError("structure 1: the potential gives NaN")
            return super().evaluate(structures)

    structures = [bulk("Cu"), bulk("Au"), bulk("Al")]
    for atoms in structures:
        atoms.info["enthalpy"] = -9.0
    state = state_of(tmp_path, search_settings(), NoGold())
    after_generation(state, structures, structures, 1)
    assert {c.formula: c.status for c in state.candidates} == {
        "Cu": "converged",
        "Al": "converged",
        "Au": "failed",
    }
    values = fitness_values([atoms.info for atoms in structures])
    assert values[1] == min(values)
    assert "NaN" in structures[1].info["reason"]


def test_stale_results_on_the_atoms_are_renewed(tmp_path):
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = bulk("Cu")
    atoms.calc = SinglePointCalculator(atoms, energy=123.0)
    reevaluate([atoms], fakes.Emt(), search_settings())
    assert atoms.get_potential_energy() == pytest.approx(atoms.info["energy"])


def test_a_survivor_that_is_in_two_lists_is_one(tmp_path):
    shared = bulk("Cu")
    state = state_of(tmp_path, search_settings())
    after_generation(state, [shared], [shared, shared], 1)
    assert len(state.candidates[0].members) == 1


def test_a_finished_round_costs_no_sscha_when_repeated(tmp_path):
    for _ in range(2):
        structures = [bulk("Cu"), bulk("Al")]
        after_generation(state_of(tmp_path, search_settings()), structures, structures, 1)
    assert len(calls(tmp_path)) == 2
    assert all(atoms.info["status"] == "converged" for atoms in structures)


def test_without_the_block_sscha_structures_are_static_and_in_the_table(tmp_path):
    keys = parse_settings(
        {"pressure": 1.0, "MainCalculator": {"calculator": "mattersim"}, "numGen": 2}
    )
    structures = [bulk("Cu"), bulk("Al")]
    assert after_generation(state_of(tmp_path, keys), structures, structures, 1) == []
    assert (tmp_path / "ranking.csv").exists()
    assert all(atoms.info["status"] == "static" for atoms in structures)
    assert fitness_values([atoms.info for atoms in structures]) == [
        pytest.approx(-atoms.info["enthalpy"]) for atoms in structures
    ]


# -------------------------------------------------------------------------------------------- seeds


def quantum_state(folder, **sscha):
    return state_of(
        folder, search_settings(pressure=150.0, sscha=sscha), fakes.Flat(), fakes.symmetrising
    )


def test_a_phase_that_only_moving_ions_stabilise_comes_back_as_seed_once(tmp_path):
    state = quantum_state(tmp_path)
    static = fakes.h3s(shift=0.12)
    seeds = after_generation(state, [static], [static], 1)
    assert len(seeds) == 1
    seed = seeds[0]
    best = state.candidates[0]
    assert seed.info["spg_quantum"] == "Im-3m (229)"
    assert (seed.info["sscha_centroid"], seed.info["candidate_id"]) == (best.run_id, best.id)
    assert seed.info["gibbs"] == best.gibbs
    relaxed = seed.copy()
    relaxed.set_cell(relaxed.cell * 0.99, scale_atoms=True)
    again = after_generation(state, [static, relaxed], [static, relaxed], 2)
    assert again == []
    assert len(calls(tmp_path)) == 1
    assert relaxed.info["gibbs"] == pytest.approx(best.gibbs)


def test_no_seeds_after_the_last_round_or_when_not_wanted(tmp_path):
    static = fakes.h3s(shift=0.12)
    assert after_generation(quantum_state(tmp_path / "a"), [static], [static], 3) == []
    assert (
        after_generation(quantum_state(tmp_path / "b", seed_back=False), [static], [static], 1)
        == []
    )


def test_a_phase_that_is_among_the_static_ones_is_no_seed(tmp_path):
    both = [fakes.h3s(shift=0.12), fakes.h3s()]
    assert after_generation(quantum_state(tmp_path), both, both, 1) == []


# -------------------------------------------------------------------------------- start and restart


def test_start_writes_the_record_and_a_restart_takes_its_seed(tmp_path):
    keys = search_settings()
    first = start(keys, tmp_path, potential=fakes.Emt())
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["seed"], record["model"]) == (first.seed, "emt")
    assert start(keys, tmp_path, restart=True, potential=fakes.Emt()).seed == first.seed
    assert (
        start(keys.model_copy(update={"seed": 5}), tmp_path / "b", potential=fakes.Emt()).seed == 5
    )


def test_a_host_that_wrote_the_record_keeps_it(tmp_path):
    state = start(search_settings(), tmp_path, potential=fakes.Emt(), seed=11, record=False)
    assert state.seed == 11
    assert not (tmp_path / "run.json").exists()


def test_the_newest_model_is_the_one_with_the_largest_number(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    for name in ("gen9.pth", "gen10.pth", "gen10.pth.tmp", "generation11.pth"):
        (tmp_path / "checkpoints" / name).touch()
    assert newest_checkpoint(tmp_path).name == "gen10.pth"
    assert newest_checkpoint(tmp_path, up_to=9).name == "gen9.pth"


def test_a_restart_knows_the_error_of_its_model(tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", {"new": {"validation": {"energy_rmse": 0.013}}})
    assert start(search_settings(), tmp_path, fakes.Emt()).energy_rmse is None
    assert start(search_settings(), tmp_path, fakes.Emt(), restart=True).energy_rmse == 0.013


def test_a_labeler_that_is_not_installed_is_an_error_or_a_warning(tmp_path, monkeypatch, caplog):
    import magus_anharmonic.labelers as labelers

    def missing(*_):
        raise LabelerNotInstalled(
            "learning.labeler.calculator: gpaw: labeler not installed: pip install gpaw"
        )

    monkeypatch.setattr(labelers, "get_labeler", missing)
    keys = search_settings(learning=LEARNING)
    with pytest.raises(InputError, match="pip install gpaw"):
        start(keys, tmp_path, potential=fakes.Emt())
    state = start(
        search_settings(learning={**LEARNING, "required": False}), tmp_path, potential=fakes.Emt()
    )
    assert not state.learn
    assert "without learning" in caplog.text
    structures = [bulk("Cu")]
    after_generation(state_of(tmp_path, keys), structures, structures, 3)


def test_under_magus_own_learning_loop_no_labeler_is_made(tmp_path):
    keys = search_settings(learning={"labeler": {"calculator": "main"}})
    state = start(keys, tmp_path, potential=fakes.Emt(), learn=False)
    assert state.labeler is None and not state.learn


def test_the_error_of_a_model_that_was_never_validated_is_unknown():
    assert rounds.validation_rmse({}) is None
    assert rounds.validation_rmse({"new": {"train": {"energy_rmse": 0.1}}}) is None
    assert rounds.validation_rmse({"new": {"validation": {"energy_rmse": float("nan")}}}) is None
