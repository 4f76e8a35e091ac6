"""Wrong input ends in one line that names the key, before anything is started; no traceback, and no
silent other meaning."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase.build import bulk
from ase.calculators.emt import EMT
from typer.testing import CliRunner

from magus_anharmonic import free_energy, load
from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.labelers import available, code_of
from magus_anharmonic.paper.ensemble_errors import load_labeler_settings
from magus_anharmonic.phase_diagram.points import read_points
from magus_anharmonic.potential.train import TrainRecipe, load_recipe, train_file
from magus_anharmonic.search.keys import HostKeys
from magus_anharmonic.settings import load_settings, load_yaml, parse, parse_settings
from magus_anharmonic.settings.campaign import load_campaign
from magus_anharmonic.settings.phase_diagram import load_phase_diagram

BASE = {
    "symbols": ["Cu"],
    "formula": [1],
    "min_n_atoms": 1,
    "max_n_atoms": 2,
    "popSize": 2,
    "saveGood": 1,
    "numGen": 1,
    "seed": 1,
    "MainCalculator": {"calculator": "mattersim", "checkpoint": "h3s-gpaw-small"},
}


def search(folder, labeler, monkeypatch):
    """Exit code and lines of ``search`` with this YAML as the block ``labeler``."""
    text = yaml.safe_dump(BASE) + f"learning:\n  labeler: {labeler}\n"
    (folder / "input.yaml").write_text(text)
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["search", "--host", "embedded"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output.strip().splitlines()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('command: "mpirun \'x"', 'arguments.command: "mpirun \'x": the quote or backslash'),
        ('command: "  "', "arguments.command: '  ': must name a program"),
        ('command: ""', "arguments.command: '': must name a program"),
        ("command: 5", "arguments.command: 5: must be text"),
        ("command: [mpirun, vasp]", "arguments.command: ['mpirun', 'vasp']: must be text"),
        (
            "x: 1, x: 2",
            "learning.labeler.arguments.x: is given twice, in lines 15 and 15; keep one",
        ),
        ("x: &a [1, *a]", "learning.labeler.arguments.x.1: holds itself (line 15, by an alias *)"),
    ],
)
@pytest.mark.parametrize("code", ["vasp", "espresso", "ase.calculators.nwchem.NWChem"])
def test_a_wrong_argument_of_a_labeler_is_one_line(
    tmp_path: Path, code: str, given: str, words: str, monkeypatch
) -> None:
    needed = "pseudopotentials: {Cu: Cu.upf}, " if code == "espresso" else ""
    status, lines = search(
        tmp_path, f"{{calculator: {code}, arguments: {{{needed}{given}}}}}", monkeypatch
    )
    assert (
        status == 2
        and len(lines) == 1
        and lines[0].startswith("input error: ")
        and words in lines[0]
    ), lines
    assert [file.name for file in tmp_path.iterdir()] == ["input.yaml"]


@pytest.mark.parametrize("given", ["[1]", "text", "5", "null"])
def test_input_data_of_espresso_is_a_block(tmp_path, given, monkeypatch):
    arguments = f"{{pseudopotentials: {{Cu: Cu.upf}}, input_data: {given}}}"
    status, lines = search(
        tmp_path, f"{{calculator: espresso, arguments: {arguments}}}", monkeypatch
    )
    assert (
        status == 2 and len(lines) == 1 and "learning.labeler.arguments.input_data: " in lines[0]
    ), lines


@pytest.mark.parametrize(
    "name",
    [
        "..x.Y",
        ".EMT",
        "EMT.",
        "a..b",
        "",
        "os.getcwd",
        "ase.Atoms",
        "ase.calculators.emt.parameters",
        "os.path",
        "this file.X",
    ],
)
def test_a_labeler_is_the_class_of_an_ase_calculator(tmp_path, name, monkeypatch):
    status, lines = search(tmp_path, f"{{calculator: '{name}'}}", monkeypatch)
    assert (
        status == 2
        and len(lines) == 1
        and lines[0].startswith(f"input error: learning.labeler.calculator: {name}: ")
    ), lines
    assert "ase.calculators.emt" in lines[0], "an example is given"
    assert not available(name)[0]


def test_a_module_that_breaks_while_it_is_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_calculator.py").write_text("raise RuntimeError('no\\nlicence')")
    monkeypatch.syspath_prepend(tmp_path)
    assert available("broken_calculator.C") == (
        False,
        "broken_calculator cannot be imported: RuntimeError: no licence",
    )


@pytest.mark.parametrize("code", ["vasp", "espresso"])
@pytest.mark.parametrize("command", ["vasp 'x", "  ", 5, ["mpirun"]])
def test_doctor_says_that_a_command_is_wrong(code: str, command: Any) -> None:
    usable, text = code_of(code).available({"command": command})
    assert not usable and text.startswith("the command ") and repr(command) in text


def test_a_key_that_is_given_twice_is_refused_with_both_lines(tmp_path):
    file = tmp_path / "input.yaml"
    file.write_text("numGen: 2\nsscha:\n  n_configs: 10\n  n_configs: 20\nnumGen: 1\n")
    with pytest.raises(InputError) as caught:
        load_yaml(file)
    assert [line.removeprefix(f"{file}: ") for line in caught.value.problems] == [
        "sscha.n_configs: is given twice, in lines 3 and 4; keep one",
        "numGen: is given twice, in lines 1 and 5; keep one",
    ]


def test_the_same_key_in_two_blocks_and_a_merged_default_are_no_repetition(tmp_path):
    file = tmp_path / "input.yaml"
    file.write_text(
        "a: &shared {x: 1, y: 2}\nb: {x: 3}\nc:\n  <<: *shared\n  x: 4\nd: [*shared, *shared]\n"
    )
    assert load_yaml(file)["c"] == {"x": 4, "y": 2}


SHIPPED = sorted(
    file
    for folder in ("inputs", "docs")
    for file in (Path(__file__).parent.parent / folder).rglob("*.yaml")
)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_shipped_file_gives_a_key_twice(file):
    assert load_yaml(file)


BOMBS = {
    "lists": [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)),
    ],
    "mappings": [
        "a0: &a0 {x: 1}",
        *(
            f"a{n}: &a{n} {{{', '.join(f'k{m}: *a{n - 1}' for m in range(9))}}}"
            for n in range(1, 12)
        ),
    ],
    "merges": [
        "a0: &a0 {x: 1}",
        *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)),
    ],
    "long texts": [f"a0: &a0 {'x' * 100_000}", f"a1: [{', '.join(['*a0'] * 1000)}]"],
}


LOADERS = [load_settings, load_campaign, load_phase_diagram, load_recipe, load_labeler_settings]


def each(cases, loaders=LOADERS):
    """All cases by the reader behind all loaders, and one of them by each loader."""
    cases = list(cases)
    return [*((case, load_yaml) for case in cases), *((cases[0], load) for load in loaders)]


@pytest.mark.parametrize(("kind", "reader"), each(BOMBS))
def test_a_short_file_that_stands_for_a_huge_one_is_refused_at_once(tmp_path, kind, reader):
    file = tmp_path / "input.yaml"
    file.write_text("\n".join(BOMBS[kind]) + "\n")
    begun = time.process_time()
    with pytest.raises(InputError, match=r"input.yaml: its aliases \(\*\) stand for more than"):
        reader(file)
    assert time.process_time() - begun < 5.0


NUMBERS = [
    "9" * 30,
    "9" * 5000,
    "0x" + "f" * 10**5,
    "0b" + "1" * 10**5,
    "1" + ":59" * 10**5,
    "1" + ":59" * 300 + ".5",
    "-" + "9" * 400,
]


@pytest.mark.parametrize(("number", "reader"), each(NUMBERS, LOADERS[:2]))
def test_a_number_that_nothing_can_hold_is_refused_at_once(tmp_path, number, reader):
    (tmp_path / "input.yaml").write_text(f"pressure: {number}\nsymbols: [H]\n")
    begun = time.process_time()
    with pytest.raises(InputError, match=r"number too large or too long.*line 1"):
        reader(tmp_path / "input.yaml")
    assert time.process_time() - begun < 5.0


@pytest.mark.parametrize(
    ("key", "reader"),
    [
        *((key, load_campaign) for key in ("a[0]", "\\e[31mkey", "[", "", ".")),
        *(("a[0]", load) for load in LOADERS[2:]),
    ],
)
def test_a_key_may_be_any_text(tmp_path, reader, key):
    (tmp_path / "input.yaml").write_text(f'"{key}": 1\n')
    with pytest.raises(InputError, match="unknown key|is missing|calculator"):
        reader(tmp_path / "input.yaml")


def test_numbers_as_people_write_them_are_read(tmp_path):
    (tmp_path / "input.yaml").write_text(
        "a: [1_000, 0x1f, -3, 1.5e-3, .inf, 1:30, 9223372036854775807]\n"
    )
    assert load_yaml(tmp_path / "input.yaml") == {
        "a": [1000, 31, -3, 0.0015, float("inf"), 90, 2**63 - 1]
    }


def test_a_file_of_megabytes_is_no_file_of_settings(tmp_path, monkeypatch):
    """The fault: 20 MB were read for minutes before a word was said."""
    monkeypatch.chdir(tmp_path)
    Path("input.yaml").write_text("pressure: 1\nnotes:\n" + "  - a line of some length\n" * 800_000)
    begun = time.process_time()
    result = CliRunner().invoke(app, ["search", "-i", "input.yaml"])
    assert result.exit_code == 2, result.output
    words = "input.yaml: has 20.8 MB, and settings at most 1"
    assert words in " ".join(result.output.split())
    for read in LOADERS:
        with pytest.raises(InputError, match=words):
            read("input.yaml")
    assert time.process_time() - begun < 30.0


def test_aliases_as_people_use_them_are_read(tmp_path):
    file = tmp_path / "input.yaml"
    lines = [
        "base: &base {" + ", ".join(f"key{n}: {n}" for n in range(50)) + "}",
        *(f"search{n}: {{<<: *base, seed: {n}}}" for n in range(60)),
    ]
    file.write_text("\n".join(lines) + "\n")
    assert load_yaml(file)["search59"] == {**{f"key{n}": n for n in range(50)}, "seed": 59}
    file.write_text("long: [" + ", ".join(map(str, range(30_000))) + "]\n")
    assert len(load_yaml(file)["long"]) == 30_000


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        parse_settings(data)
    return str(caught.value)


def test_a_symmetry_tolerance_of_whole_bonds_is_refused():
    """spglib ended the whole process with ``symprec: 5``, and called hcp P1."""
    assert "sscha.symprec: 5" in refused({"sscha": {"symprec": 5}})
    assert parse_settings({"sscha": {"symprec": 1.0}}).sscha.symprec == 1.0
    with pytest.raises(InputError, match="symprec: 5"):
        parse(HostKeys, {"symprec": 5, "formula": [1], "min_n_atoms": 1, "max_n_atoms": 1})


def test_a_symbol_that_is_given_twice_is_refused():
    """No random crystal fitted the formula, and the search tried for ever."""
    assert "Cu is given twice" in refused({"symbols": ["Cu", "Ag", "Cu"]})


@pytest.mark.parametrize("length", [-1, "0 A"])
def test_a_length_of_a_supercell_is_refused_in_one_line(length):
    said = refused({"sscha": {"supercell": {"min_length": length}}})
    assert "min_length must be above 0" in said and len(said.splitlines()) == 1


def test_a_device_that_nobody_knows_is_not_called_a_damaged_checkpoint():
    with pytest.raises(InputError, match="device gpu: must be cpu or cuda"):
        load("h3s-gpaw-small", device="gpu")


def test_a_folder_instead_of_a_checkpoint_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        train_file([tmp_path / "not-even-read.xyz"], tmp_path, load_recipe_of_one_epoch())


def load_recipe_of_one_epoch() -> TrainRecipe:
    return parse(TrainRecipe, {"stages": [{"epochs": 1}]}, "train")


@pytest.mark.parametrize("volume", [-10.0, 0.0])
def test_a_volume_that_is_none_is_refused_with_its_line(tmp_path, volume):
    names = "phase,pressure_GPa,temperature_K,gibbs_eV_per_atom,gibbs_error_eV_per_atom"
    more = "volume_A3_per_atom,volume_error_A3_per_atom"
    table = tmp_path / "gibbs.csv"
    table.write_text(f"{names},{more}\nA,0,0,0.1,1e-4,{volume},0.1\n")
    with pytest.raises(InputError, match="line 2: volume_A3_per_atom: .* above 0"):
        read_points(table)


WRONG = {
    "atoms": ("Cu.vasp", EMT(), {}, "atoms: str: must be one ase.Atoms"),
    "several": ([bulk("Cu")], EMT(), {}, "atoms: list: must be one ase.Atoms"),
    "class": (bulk("Cu"), EMT, {}, "evaluator: EMT is a class"),
    "seed": (bulk("Cu"), EMT(), {"seed": -1}, "seed: -1: must be one whole number"),
    "half a seed": (bulk("Cu"), EMT(), {"seed": 1.5}, "seed: 1.5: must be one whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_of_free_energy_is_named(name):
    atoms, evaluator, more, words = WRONG[name]
    with pytest.raises(InputError, match=words):
        free_energy(atoms, evaluator, **more)


def test_numbers_of_numpy_are_numbers():
    plain = {"n_configs": 8, "temperature": 300, "seed": 2, "supercell": (1, 1, 2)}
    numpy = {name: np.asarray(value)[()] for name, value in plain.items()}
    cell = {"cell": "fixed", "max_populations": 1}
    found = [
        free_energy(bulk("Cu"), EMT(), masses={"Cu": mass}, **cell, **given).numbers.gibbs
        for mass, given in ((63, plain), (np.int64(63), numpy))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("output", ["taken", "taken/below"])
def test_a_file_where_the_output_folder_should_be_is_wrong_input(tmp_path, monkeypatch, output):
    """It said that finished work is kept, and to run the same command again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    bulk("Cu", cubic=True).write("cu.vasp")
    command = ["rank", "cu.vasp", "--calculator", "ase.calculators.emt.EMT", "-o", output]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "give the path of a folder" in result.stderr
    assert "finished work" not in result.stderr


def test_deuterium_is_said_to_be_a_mass():
    assert "write H, and give its mass" in refused({"symbols": ["D", "S"]})


@pytest.mark.parametrize(("before", "after", "code"), [(",", ";", "utf-8"), ("", "", "utf-16")])
def test_a_table_of_another_form_is_refused_with_what_to_do(tmp_path, before, after, code):
    text = "phase,pressure_GPa\nA,1\n"
    (tmp_path / "g.csv").write_bytes(text.replace(before, after).encode(code))
    with pytest.raises(InputError, match="save it as UTF-8 with commas"):
        read_points(tmp_path / "g.csv")
