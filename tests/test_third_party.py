"""Parts of other packages: the page "Write your own" as it stands, what is declared twice or broken,
and checks that find what is wrong."""

import importlib
import re
import runpy
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

from magus_anharmonic import doctor, third_party
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.labelers import CallableLabeler, available, get_labeler
from magus_anharmonic.ranking.evaluators import evaluator_of, ranking_evaluator
from magus_anharmonic.ranking.fitness import third_party_fitness
from magus_anharmonic.ranking.structures import _relaxation_block
from magus_anharmonic.search.host import run
from magus_anharmonic.search.keys import parse_host_keys
from magus_anharmonic.settings import (
    AseCalculatorSettings,
    LabelerSettings,
    parse_settings,
    rank_settings,
)
from magus_anharmonic.testing import check_evaluator, check_labeler

PAGE = (Path(__file__).parents[1] / "docs" / "write-your-own.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL))
SEARCH = {
    "symbols": ["Cu"],
    "formula": [1],
    "min_n_atoms": 1,
    "max_n_atoms": 2,
    "spacegroup": [221, 225, 229],
    "popSize": 3,
    "saveGood": 1,
    "numGen": 1,
    "seed": 1,
    "MainCalculator": {"calculator": "morse", "jobPrefix": "Morse", "maxStep": 5},
}


def install(folder, project):
    """The metadata that pip would write for this pyproject.toml."""
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The package of the page, installed, also for the processes that make labels."""
    folder = tmp_path / "site"
    (folder / "morse_parts").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    install(folder, tomllib.loads(FILES["pyproject.toml"])["project"])
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    third_party.load.cache_clear()
    third_party_fitness.cache_clear()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "morse_parts"]:
        del sys.modules[name]


def test_the_files_of_the_page_pass_their_own_tests(site, tmp_path):
    tests = runpy.run_path(str(site / "test_morse_parts.py"))
    tests["test_the_evaluator"]()
    tests["test_the_labeler"](tmp_path / "labels")


def test_a_search_uses_the_names_of_another_package(site, tmp_path):
    outcome = run(parse_settings({**SEARCH, "Fitness": ["Density"]}), tmp_path)
    densities = [len(atoms) / atoms.get_volume() for atoms in outcome.good]
    assert densities == sorted(densities, reverse=True) and len(densities) > 1
    assert outcome.good[0].info["model"] == "morse-0.35-2.7-1.4"
    changed = {**SEARCH["MainCalculator"], "arguments": {"depth": 0.4}}
    evaluator, _ = evaluator_of(parse_settings({**SEARCH, "MainCalculator": changed}))
    assert evaluator.model_id == "morse-0.4-2.7-1.4"
    named = parse_settings({**SEARCH, "sscha": {"evaluator": changed}})
    assert ranking_evaluator(named).model_id == "morse-0.4-2.7-1.4"
    asked = rank_settings(None, {}, calculator={"calculator": "morse"}, sscha={})
    assert ranking_evaluator(asked).model_id == "morse-0.35-2.7-1.4"
    assert isinstance(_relaxation_block(asked), AseCalculatorSettings)
    changed["arguments"] = {"deep": 0.4}
    with pytest.raises(InputError, match="'morse': cannot be made with arguments"):
        evaluator_of(parse_settings({**SEARCH, "MainCalculator": changed}))


def test_nothing_is_imported_before_its_name_is_used(site):
    parse_host_keys(parse_settings({**SEARCH, "Fitness": ["Enthalpy"]}))
    assert set(third_party.declared("labelers")) == {"morse"}
    assert available("ase.calculators.emt.EMT")[0] and available("gpaw") is not None
    assert "morse_parts" not in sys.modules
    assert available("morse") == (True, "it comes with ASE")
    assert "morse_parts.labeler" in sys.modules


BROKEN = {
    "name": "broken-parts",
    "version": "2.0",
    "entry-points": {
        "magus_anharmonic.labelers": {"broken": "broken_parts:Lost", "wrong": "json:dumps"},
        "magus_anharmonic.evaluators": {
            "broken": "broken_parts:make",
            "wrong": "json:JSONEncoder",
            "gone": "gone_parts:make",
            "emt": "json:JSONEncoder",
        },
        "magus_anharmonic.fitness": {"Broken": "broken_parts:f", "Density": "broken_parts:g"},
    },
}


def test_a_broken_part_is_named_and_stops_only_who_uses_it(site, tmp_path, monkeypatch):
    (site / "broken_parts.py").write_text("raise RuntimeError('no licence')\n")
    (site / "gone_parts.py").write_text("raise SystemExit('no GPU')\n")
    install(site, BROKEN)
    importlib.invalidate_caches()
    why = "broken_parts:{} of broken-parts 2.0 cannot be loaded: RuntimeError: no licence"
    assert available("broken") == (False, f"broken: {why.format('Lost')}")
    for name, said in {"broken": "no licence", "wrong": "no subclass of"}.items():
        with pytest.raises(InputError, match=said):
            get_labeler(LabelerSettings(calculator=name), tmp_path)
    problems = {
        "broken": "no licence",
        "gone": "cannot be loaded: SystemExit: no GPU",
        "wrong": "no evaluator .* and no ASE calc",
    }
    for name, said in problems.items():
        with pytest.raises(InputError, match=said):
            evaluator_of(parse_settings({**SEARCH, "MainCalculator": {"calculator": name}}))
    emt = evaluator_of(parse_settings({**SEARCH, "MainCalculator": {"calculator": "emt"}}))[0]
    assert emt.model_id.startswith("emt-"), "our names stay ours"
    problems = {"Broken": "no licence", "Density": "more than one package", "Lost": "SSCHA, Broken"}
    for name, said in problems.items():
        with pytest.raises(InputError, match=said):
            parse_host_keys(parse_settings({**SEARCH, "Fitness": [name]}))
    assert run(parse_settings({**SEARCH}), tmp_path).good, "nobody else is stopped"

    def checks(**keys):
        found = doctor._third_party(parse_settings({**SEARCH, **keys}))
        return {check.name.removesuffix(" of another package"): check for check in found}

    seen = checks(Fitness=["Broken"])
    assert seen["evaluator morse"].ok and seen["evaluator morse"].needed
    assert seen["evaluator morse"].detail == "morse_parts.evaluator:Morse of morse-parts 1.0"
    assert seen["labeler broken"].ok is None and why.format("Lost") in seen["labeler broken"].detail
    assert seen["fitness Broken"].ok is False and doctor.exit_code(seen.values()) == 1
    assert checks(sscha={"evaluator": "broken"})["evaluator broken"].needed
    assert doctor.exit_code(checks().values()) == 0


def test_a_fitness_must_give_one_finite_number_each(site, monkeypatch):
    import morse_parts.fitness

    density = third_party_fitness("Density")
    assert density([bulk("Cu")])[0] == pytest.approx(8935, rel=0.01)
    for values in ([1.0, 2.0], [np.nan]):
        monkeypatch.setattr(morse_parts.fitness, "density", lambda structures, v=values: v)
        third_party.load.cache_clear()
        third_party_fitness.cache_clear()
        with pytest.raises(InputError, match="one finite number for each of the 1 structures"):
            third_party_fitness("Density")([bulk("Cu")])


# ------------------------------------------------------- the checks find what is wrong


class Changed(EMT):
    """EMT whose results are changed by a function of them and of the structure."""

    def __init__(self, change, **parameters):
        self.change = change
        super().__init__(**parameters)

    def calculate(self, atoms=None, *arguments):
        super().calculate(atoms, *arguments)
        self.change(self.results, self.atoms)


def shape(results, atoms):
    results["forces"] = results["forces"][:-1]


def sign(results, atoms):
    results["forces"] = -results["forces"]


def stress_unit(results, atoms):
    results["stress"] = 160.2 * results["stress"]


def constant(results, atoms):
    results["energy"] += 1.0


def missing(results, atoms):
    results["energy"] = np.nan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shape, "results: .*shape"),
        (missing, "results: energy that are no numbers"),
        (sign, "forces and stress against energy: .*of the other sign than ASE's"),
        (stress_unit, "forces and stress against energy: .*in GPa instead of eV/A"),
        (constant, "cell of twice the size: the energy must be twice as large"),
    ],
)
def test_the_check_of_a_calculator_names_what_is_wrong(change, said):
    source = CalculatorEvaluator(Changed(change), model_id="changed")
    with pytest.raises(AssertionError, match=said):
        check_evaluator(source)


class Batch:
    """EMT in batches, with one fault."""

    def __init__(self, fault=""):
        self.fault, self.calls = fault, 0

    @property
    def model_id(self):
        return f"batch-{self.calls}" if self.fault == "id" else "batch"

    def evaluate(self, structures):
        self.calls += 1
        if self.fault == "moves":
            structures[0].positions[0] += 0.1
        found = CalculatorEvaluator(EMT(), "emt").evaluate(structures)
        if self.fault == "order" and len(structures) > 1:
            found = CalculatorEvaluator(EMT(), "emt").evaluate(structures[::-1])
        if self.fault == "drifts":
            found.energy[:] += 0.1 * self.calls
        return found


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("order", "batch: .*forces of another shape in a batch with others"),
        ("moves", "structures: a structure must be left as it is"),
        ("id", "again: model_id was batch-0 and is batch-"),
        ("drifts", "batch: the same structure has other numbers"),
    ],
)
def test_the_check_of_an_evaluator_names_what_is_wrong(fault, said):
    with pytest.raises(AssertionError, match=said):
        check_evaluator(Batch(fault))


class Lost(Calculator):
    implemented_properties = ["energy", "forces"]

    def calculate(self, *arguments):
        raise RuntimeError("lost")


def test_what_is_sound_passes_and_says_which_checks_it_passed(potential, h3s):
    assert check_evaluator(Batch()) == check_evaluator(EMT())
    assert "forces and stress against energy" in check_evaluator(EMT(), bulk("Al", cubic=True))
    assert check_evaluator(potential, h3s(shift=0.05)) == check_evaluator(EMT())
    with pytest.raises(AssertionError, match="kind: raised TypeError: .*no evaluator"):
        check_evaluator(3)
    with pytest.raises(AssertionError, match="model id: no id can be made"):
        check_evaluator(Lost())


def labels(fault):
    def make(structures):
        found = []
        for atoms in structures:
            broken = not np.isfinite(atoms.positions).all()
            if broken and fault == "raises":
                raise RuntimeError("SCF")
            if broken and fault != "silent":
                found.append("" if fault == "no reason" else "SCF did not converge")
                continue
            atoms = bulk("Cu", cubic=True) if broken else atoms.copy()
            atoms.calc = EMT()
            found.append(
                {
                    "energy": atoms.get_potential_energy(),
                    "forces": atoms.get_forces(),
                    "stress": (-1 if fault == "sign" else 1) * atoms.get_stress(),
                }
            )
        return found

    return make


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises", "failure reasons: raised RuntimeError: SCF"),
        ("silent", "failure reasons: .*it must be a Failure"),
        ("no reason", "failure reasons: a Failure must say why"),
        ("sign", "forces and stress against energy: .*of the other sign"),
        ("hash", "settings hash: settings_hash must be twelve"),
        ("", ""),
    ],
)
def test_the_check_of_a_labeler_names_what_is_wrong(fault, said):
    labeler = CallableLabeler(labels(fault), description="EMT", settings={})
    if fault == "hash":
        labeler.settings_hash = "1"
    if not fault:
        assert check_labeler(labeler)[-1] == "close"
        return
    with pytest.raises(AssertionError, match=said):
        check_labeler(labeler)
