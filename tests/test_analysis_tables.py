"""The tables of a campaign: what is written is read back, and what is wrong is named."""

import dataclasses
import typing

import pytest
from refusals import refused

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.files import SUMS
from magus_anharmonic.paper import tables

SAMPLES = {str: "text, with a comma", int: 7, float: 0.1234567891}


def sample(table, *, empty):
    """A row whose optional cells are empty, or all filled."""
    values = {}
    for name, hint in typing.get_type_hints(table).items():
        choices = typing.get_args(hint)
        if name == "FILE":
            continue
        if type(None) in choices:
            values[name] = None if empty else SAMPLES[choices[0]]
        elif typing.get_origin(hint) is typing.Literal:
            values[name] = choices[0]
        else:
            values[name] = SAMPLES[hint]
    if "unit" in values:
        values["unit"] = {**tables.UNITS, **tables.GRADIENT_UNITS}[values["quantity"]]
    return table(**values)


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "full"])
@pytest.mark.parametrize("table", tables.TABLES, ids=lambda table: table.__name__)
def test_every_table_is_read_as_it_was_written(table, empty, tmp_path):
    rows = [sample(table, empty=empty)] * 2
    tables.write(table, tmp_path / "t.csv", rows)
    assert tables.read(table, tmp_path / "t.csv") == rows


def changed(tmp_path, table, old, new):
    path = tmp_path / table.FILE.replace("<P>", "100")  # type: ignore[attr-defined]
    tables.write(table, path, [sample(table, empty=False)])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    path.with_name(SUMS).unlink()  # a user's table
    return path


@pytest.mark.parametrize(
    ("table", "old", "new", "words"),
    [
        (
            tables.ModelError,
            "stress_rmse_GPa",
            "other",
            ["model_errors.csv", "stress_rmse_GPa", "missing"],
        ),
        (
            tables.ModelError,
            "energy_rmse_eV_per_atom",
            "energy_rmse_meV_per_atom",
            ["energy_rmse_meV_per_atom", "wrong unit"],
        ),
        (
            tables.Enthalpy,
            "volume_A3_per_atom",
            "volume_bohr3_per_atom",
            ["volume_bohr3_per_atom", "wrong unit"],
        ),
        (
            tables.Mode,
            "frequency_squared_cm2",
            "frequency_squared_THz2",
            ["frequency_squared_THz2", "wrong unit"],
        ),
        (tables.Enthalpy, ",7,", ",seven,", ["line 2", "natoms", "'seven'", "must be a number"]),
        (tables.Enthalpy, ",7,", ",7.5,", ["line 2", "natoms", "whole number"]),
        (tables.Enthalpy, ",0.1234567891,", ",nan,", ["line 2", "finite number"]),
        (tables.Mode, "harmonic", "sscha", ["line 2", "method", "harmonic or sscha-hessian"]),
        (tables.Parity, "eV/atom", "meV/atom", ["line 2", "energy must be in eV/atom"]),
        (tables.GradientError, "eV/A", "eV/bohr", ["line 2", "force must be in eV/A"]),
    ],
)
def test_a_wrong_table_is_refused_and_the_message_says_where(tmp_path, table, old, new, words):
    path = changed(tmp_path, table, old, new)
    with refused(path.name, *words):
        tables.read(table, path)


def test_a_missing_file_is_named_and_an_optional_one_has_no_rows(tmp_path):
    with pytest.raises(InputError, match="cost.csv: no such file"):
        tables.read(tables.Cost, tmp_path / "cost.csv")
    assert tables.read_if_there(tables.Cost, tmp_path) == []


def test_further_columns_and_a_missing_optional_one_do_no_harm(tmp_path):
    path = tmp_path / "gradient_errors.csv"
    row = dataclasses.replace(sample(tables.GradientError, empty=False), single=None)
    names = [name for name in tables.columns(tables.GradientError) if name != "single"]
    cells = ['"' + str(getattr(row, name)) + '"' for name in names]
    path.write_text(",".join([*names, "of_another"]) + "\n" + ",".join([*cells, "0.5"]) + "\n")
    assert tables.read(tables.GradientError, path) == [row]
