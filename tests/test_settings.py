"""Keys know their dimension: a value may have a unit, is converted to that of the key, and one of
another dimension is refused by its key path."""

import re
from typing import get_args

import pytest
from ase import units
from typer.testing import CliRunner

from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.plugins.parameters import settings_of
from magus_anharmonic.search.keys import HostKeys, parse_host_keys
from magus_anharmonic.settings import In, Section, parse_settings
from magus_anharmonic.settings.campaign import parse_campaign
from magus_anharmonic.settings.phase_diagram import PhaseDiagramSettings
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
    campaign = parse_campaign(
        {"search": {}, "labeler": {"calculator": "gpaw", "timeout": "2 h"}, "dft": None}
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
            if named and numeric and name not in lists:
                known = units_in(field.annotation, field.metadata)
                if known != {words[named[1]]}:
                    wrong.append((model.__name__, name, known))
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
