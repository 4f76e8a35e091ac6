"""Keys know their dimension: a value may have a unit, is converted to that of the key, and one of
another dimension is refused by its key path. Editors know the keys by JSON schemas; `init` writes a
first input."""

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from ase import units
from typer.testing import CliRunner

from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.plugins.parameters import settings_of
from magus_anharmonic.search.keys import HostKeys, parse_host_keys
from magus_anharmonic.settings import In, Section, load_settings, load_yaml, parse, parse_settings
from magus_anharmonic.settings.campaign import CampaignSettings, load_campaign
from magus_anharmonic.settings.phase_diagram import PhaseDiagramSettings, load_phase_diagram
from magus_anharmonic.starter import FILES, schema_file, write_input
from magus_anharmonic.units import EXAMPLES, UNITS, dimension_of, quantity


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (150, "GPa", 150),
        ("150 GPa", "GPa", 150.0),
        ("150GPa", "GPa", 150.0),
        ("1.5 Mbar", "GPa", 150.0),
        ("3 kbar", "GPa", 0.3),
        ("1.5e11 Pa", "GPa", 150.0),
        ("1 eV/Å^3", "GPa", 1 / units.GPa),
        ("300 K", "K", 300.0),
        ("5 meV", "eV/atom", 0.005),
        ("5 meV / atom", "eV/atom", 0.005),
        ("1 Ry", "eV/atom", units.Ry),
        ("1 kJ/mol", "eV/atom", units.kJ / units.mol),
        ("1 Ry/bohr", "eV/A", units.Ry / units.Bohr),
        ("1 bohr", "A", units.Bohr),
        ("0.2 1/A", "2 pi/A", 0.1 / 3.141592653589793),
        ("0.03 2*pi/A", "2 pi/A", 0.03),
        ("2 h", "s", 7200.0),
        ("2.014 u", "amu", 2.014),
    ],
)
def test_a_value_with_a_unit_is_converted(value, unit, expected):
    assert quantity(value, unit) == pytest.approx(expected, rel=1e-11)


def test_the_unit_of_bare_numbers_is_the_first_of_its_dimension_and_examples_can_be_read():
    for dimension, known in UNITS.items():
        first = next(iter(known))
        assert known[first] == 1.0 and dimension_of(first) == dimension
        assert quantity(EXAMPLES[dimension], first) > 0


LABELER = {"labeler": {"calculator": "gpaw"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pressure": "150e9"}, "pressure: 150000000000.0: looks like Pa: .* give 150 GPa"),
        ({"pressure": 150e9}, "pressure: .*give 150 GPa"),
        ({"pressure": "5 meV"}, "pressure: '5 meV': meV is a unit of energy; needed is pressure"),
        ({"pressure": "-1 GPa"}, "pressure: .*must not be negative"),
        ({"sscha": {"temperature": [0, "30 GPa"]}}, "sscha.temperature: .*GPa is a unit of press"),
        ({"sscha": {"window": "5 MeV"}}, "sscha.window: '5 MeV': MeV is no unit .*mean meV?"),
        ({"sscha": {"symprec": "0.05 s"}}, "sscha.symprec: .*s is a unit of time; needed is leng"),
        ({"learning": {**LABELER, "target_rmse": "-5 meV"}}, "learning.target_rmse: .*greater tha"),
        ({"workers": {"walltime": "1 min"}}, "workers.walltime: .*greater than or equal to 600"),
        ({"workers": {"walltime": "24 K"}}, "workers.walltime: '24 K': K is a unit of temperature"),
    ],
)
def test_another_dimension_is_refused_by_key_path(given, said):
    with pytest.raises(InputError, match=said):
        parse_settings(given)


def test_every_file_of_settings_takes_units():
    found = parse_settings(
        {
            "symbols": ["H"],
            "numGen": 1,
            "pressure": "1500 kbar",
            "formula": [1],
            "min_n_atoms": 1,
            "max_n_atoms": 4,
            "popSize": 2,
            "saveGood": 1,
            "dE": "1 meV",
            "MainCalculator": {"calculator": "mattersim", "eps": "20 meV/A"},
            "sscha": {"temperature": ["300 K"], "supercell": {"min_length": "0.8 nm"}},
            "workers": {"walltime": "24 h"},
        }
    )
    assert found.pressure == 150.0 and found.calculator and found.calculator.eps == 0.02
    assert found.sscha and found.sscha.temperatures == (300.0,)
    assert found.sscha.supercell == {"min_length": 8.0} and found.workers.walltime == 86400
    assert parse_host_keys(found)[0].dE == 0.001
    campaign = parse(
        CampaignSettings,
        {"search": {}, "labeler": {"calculator": "gpaw", "timeout": "2 h"}, "dft": None},
    )
    assert campaign.labeler and campaign.labeler.timeout == 7200.0
    diagram = PhaseDiagramSettings.model_validate(
        {
            "phases": {"a": "a.cif"},
            "pressures": ["500 kbar", "100 GPa"],
            "temperatures": ["300 K"],
            "isotopes": {"D": {"H": "2.014 amu"}},
        }
    )
    assert diagram.pressures == [50.0, 100.0] and diagram.isotopes["D"] == {"H": 2.014}


def test_what_stock_magus_reads_itself_stays_a_number():
    given = {"pressure": "150 GPa", "dE": "1 meV", "sscha": {"temperature": "300 K"}}
    with pytest.raises(InputError) as error:
        settings_of(given)
    assert [line.split(":")[0] for line in error.value.problems] == ["pressure", "dE"]
    assert "number in GPa" in error.value.problems[0]
    assert settings_of({**given, "pressure": 150, "dE": 0.001}).pressure == 150


def all_sections():
    found, queue = [], [Section]
    while queue:
        queue += (below := queue.pop().__subclasses__())
        found += below
    assert HostKeys in found and len(found) > 25
    return found


def units_in(annotation, metadata=()):
    inner = [units_in(one, getattr(one, "__metadata__", ())) for one in get_args(annotation)]
    return {item.unit for item in metadata if isinstance(item, In)}.union(*inner)


def test_every_number_whose_description_names_a_unit_has_it():
    words = {"GPa": "GPa", "K": "K", "eV/atom": "eV/atom", "Angstrom": "A", "seconds": "s"}
    lists = {"distance_matrix", "radius", "min_lattice", "max_lattice"}
    wrong = []
    for model in all_sections():
        for name, field in model.model_fields.items():
            named = re.match(r"(GPa|K|eV/atom|Angstrom|seconds)\b", field.description or "")
            numeric = "float" in str(field.annotation) or "PressureGPa" in str(field.annotation)
            in_name = name.endswith(("_GPa", "_K"))  # of expected.yaml, where the name says it
            if named and numeric and not in_name and name not in lists:
                known = units_in(field.annotation, field.metadata)
                if known != {words[named[1]]}:
                    wrong.append((model.__name__, name, known))
    assert not wrong


def test_no_key_has_one_limit_twice():
    """Pydantic takes the inner one of a type (``Count``) and drops that of the field."""
    wrong = []
    for model in all_sections():
        for name, field in model.model_fields.items():
            kinds = [type(item) for item in field.metadata if hasattr(item, "__slots__")]
            limits = [kind.__name__ for kind in kinds if kind.__name__ in ("Ge", "Gt", "Le", "Lt")]
            if len(set(limits)) < len(limits):
                wrong.append((model.__name__, name, limits))
    assert not wrong


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--pressure", "5meV"], "meV is a unit of energy"),
        (["--pressure", "150e9"], "looks like Pa"),
        (["--temperature", "300 GPa"], "GPa is a unit of pressure"),
    ],
)
def test_options_take_units_too(option, said, tmp_path):
    from ase.build import bulk

    bulk("Cu").write(tmp_path / "cu.cif")
    command = ["rank", str(tmp_path / "cu.cif"), "--calculator", "ase.calculators.emt.EMT"]
    result = CliRunner().invoke(app, [*command, *option], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and said in result.output


# ------------------------------------------------------------------------- JSON schemas

ROOT = Path(__file__).parents[1]
FIRST_LINE = re.compile(r"# yaml-language-server: \$schema=(\S+)\n")
INPUTS = [path for path in sorted(ROOT.glob("inputs/**/*.yaml")) if path.name != "expected.yaml"]


def validator(file):
    schema = json.loads(file.read_text())
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


def named_schema(path):
    """The schema that the first line of a file names."""
    found = FIRST_LINE.match(path.read_text())
    assert found, f"{path}: the first line names no schema"
    return (path.parent / found[1]).resolve()


def test_the_shipped_schemas_are_those_of_the_models():
    made = runpy.run_path(str(ROOT / "docs" / "make_schemas.py"))
    for name, text in made["render"]().items():
        shipped = json.loads((made["FOLDER"] / name).read_text())
        assert shipped == json.loads(text), "run python docs/make_schemas.py"


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: str(path.relative_to(ROOT / "inputs")))
def test_every_input_names_the_schema_that_it_keeps_to(path):
    schema = named_schema(path)
    expected = {name: schema_file(kind) for kind, name in FILES.items()}
    if path.name in expected:
        assert schema == expected[path.name]
    validator(schema).validate(load_yaml(path))


@pytest.mark.parametrize(
    ("kind", "given", "ok"),
    [
        ("search", {"pressure": "150 GPa", "sscha": {"temperature": ["300 K", 0]}}, True),
        ("search", {"sscha": {"nConfigs": 100}, "popSize": 4, "refE": 1, "pop_size": 4}, True),
        ("search", {"sscha": None, "workers": None, "learning": None}, True),
        ("search", {"workers": {"walltime": "24:00:00"}}, True),
        ("search", {"MainCalculator": {"calculator": "vasp", "xc": "PBE"}}, True),
        ("search", {"MainCalculator": {"calculator": "mattersim", "kicks": 2}}, True),
        ("search", {"MainCalculator": {"calculator": "mattersim", "xc": "PBE"}}, False),
        ("search", {"presure": 150}, False),
        ("search", {"sscha": {"temperature": "5 meV"}}, False),
        ("search", {"sscha": {"supercell": [2, 2]}}, False),
        ("search", {"learning": {"n_sample": 3}}, False),
        ("campaign", {"search": {"popSize": 4}, "sscha": {"pressures": [1]}}, True),
        ("campaign", {"search": {}, "learning": {"pressures": ["1 GPa"]}}, True),
        ("campaign", {"search": {"pressure": 4}}, False),
        ("campaign", {"search": {}, "sscha": {"pressures": [1], "settings": {"n_conf": 1}}}, False),
        ("campaign", {}, False),
        ("phase-diagram", {"phases": {"a": "a.cif"}, "pressures": [1], "isotopes": {"n": None}}, 1),
        ("phase-diagram", {"phases": {"a": 3}, "pressures": [1]}, False),
        ("phase-diagram", {"phases": {"a": "a.cif"}}, False),
    ],
)
def test_the_schemas_tell_right_from_wrong(kind, given, ok):
    assert validator(schema_file(kind)).is_valid(given) is bool(ok)


# -------------------------------------------------------------------------------- init


def written(folder, kind, compound, *pressures, **options):
    path = write_input(kind, compound, pressures, path=folder / FILES[kind], **options)
    assert named_schema(path) == schema_file(kind)
    validator(schema_file(kind)).validate(load_yaml(path))
    return path


@pytest.fixture
def phases(tmp_path):
    """A folder with two structures of H3S and one of something else."""
    for file in (ROOT / "inputs" / "h3s-phase-diagram").glob("*.vasp"):
        shutil.copy(file, tmp_path)
    shutil.copy(tmp_path / "R3m.vasp", tmp_path / "POSCAR_other")
    text = (tmp_path / "POSCAR_other").read_text()
    (tmp_path / "POSCAR_other").write_text(text.replace(" S", " P"))
    return tmp_path


@pytest.mark.parametrize("labeler", ["gpaw", "vasp", "espresso", "ase.calculators.emt.EMT", "none"])
def test_init_writes_inputs_that_pass_their_checks(labeler, phases, monkeypatch):
    (phases / "H.pbe-rrkjus.UPF").touch()
    monkeypatch.setenv("ESPRESSO_PSEUDO", str(phases))
    search = load_settings(written(phases, "search", "SH3", 150.0, labeler=labeler))
    assert search.pressure == 150 and search.symbols == ["S", "H"]
    assert search.host["formula"] == [1, 3] and search.host["max_n_atoms"] == 16
    campaign = load_campaign(written(phases, "campaign", "H3S", 100.0, 50.0, labeler=labeler))
    assert campaign.produce and campaign.produce.pressures == [50, 100]
    assert {phase.name for phase in campaign.phases} == {"Im-3m", "R3m"}
    if labeler == "none":
        assert search.learning is None and campaign.labeler is None and campaign.dft is None
        return
    assert search.learning and campaign.learning and campaign.dft and campaign.labeler
    assert search.learning.labeler.calculator == campaign.labeler.calculator == labeler
    if labeler == "espresso":
        found = search.learning.labeler.arguments["pseudopotentials"]
        assert found == {"S": "S.upf", "H": "H.pbe-rrkjus.UPF"}


def test_init_finds_the_phases_of_a_diagram_and_says_what_is_missing(phases, tmp_path):
    path = written(phases, "phase-diagram", "H3S", 50.0, 100.0, temperatures=[300.0, 0.0])
    diagram = load_phase_diagram(path)
    assert set(diagram.phases) == {"Im-3m", "R3m"} and diagram.temperatures == [0, 300]
    assert all(Path(phase.structure).is_file() for phase in diagram.phases.values())
    path.unlink()
    for given, said in [
        (("phase-diagram", "MgO", 1.0), "holds no structure of MgO"),
        (("search", "H3Q", 1.0), "no chemical formula"),
        (("search", "MgO", 1.0, 2.0), "a search has one"),
        (("search", "MgO", 1.5e11), "--pressure: looks like Pa"),
    ]:
        with pytest.raises(InputError, match=said):
            written(phases, *given)
    with pytest.raises(InputError, match="--labeler: nothing.Like: "):
        written(phases, "search", "MgO", 1.0, labeler="nothing.Like")


def test_init_never_writes_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["init", "MgO", "--pressure", "10 kbar", "--labeler", "none"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert load_settings("input.yaml").pressure == 1.0
    Path("input.yaml").write_text("mine: true\n")
    for where in ([], ["-o", str(tmp_path)]):
        refused = CliRunner().invoke(app, [*command, *where])
        assert refused.exit_code == 2 and "input.yaml: exists" in refused.output
    assert Path("input.yaml").read_text() == "mine: true\n"
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert load_settings("input.yaml").symbols == ["Mg", "O"]


@pytest.mark.slow
def test_what_init_writes_runs(tmp_path, monkeypatch):
    """With smaller numbers: a search of one generation."""
    from magus_anharmonic.search.host import run

    path = written(tmp_path, "search", "H3S", 150.0, labeler="none", checkpoint="h3s-gpaw-small")
    data = load_yaml(path)
    data |= {"popSize": 2, "initSize": 2, "numGen": 1, "saveGood": 1, "max_n_atoms": 4}
    data["MainCalculator"]["maxStep"] = 8
    data["sscha"] |= {"n_configs": 20, "max_candidates": 1, "max_populations": 1, "hessian": 0}
    path.write_text(yaml.safe_dump(data))
    outcome = run(load_settings(path), tmp_path)
    assert outcome.good and (tmp_path / "results" / "anharmonic" / "run.json").is_file()
