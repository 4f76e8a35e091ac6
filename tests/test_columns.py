"""One record: its fields are the columns of every table, and a number that is added to it is in all
of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate

import pytest
from ranking_fakes import h3s
from records import a_candidate, stored_run
from refusals import refused

from magus_anharmonic.io.files import SUMS
from magus_anharmonic.io.tables import column, columns, columns_of, read, write
from magus_anharmonic.phase_diagram.points import GibbsPoint
from magus_anharmonic.ranking.candidate import Candidate, read_ranking, write_ranking
from magus_anharmonic.ranking.store import Key, Run

ROOT = Path(__file__).parents[1]
NEW = """    zero_point: float | None = column(
        "zero-point energy of the auxiliary modes", "eV/atom", equation="sum hbar omega / 2 N"
    )
"""
SCRIPT = """
import runpy
from pathlib import Path
import ranking_fakes as fakes
from ase.build import bulk
from magus_anharmonic.ranking.store import FreeEnergyStore
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.report import write_report
from magus_anharmonic.settings import parse_settings

def with_zero_point(*arguments, **options):
    result = fakes.shifted(*arguments, **options)
    result.zero_point = 0.12345
    return result

settings = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": {"hessian": 0}})
rank_structures(
    [bulk("Cu")], fakes.Emt(), settings, "run", relax=False, free_energy=with_zero_point, workers=1
)
head, row = Path("run/ranking.csv").read_text().splitlines()
assert dict(zip(head.split(","), row.split(",")))["zero_point_eV_per_atom"] == "0.123450"
(run,) = FreeEnergyStore("run/free_energies.db").runs()
assert run.free_energy.zero_point == 0.12345
page = write_report("run").read_text()
assert "zero point (eV/atom)" in page and "0.12345" in page
assert "`zero_point_eV_per_atom`" in runpy.run_path(DOCS)["render"]()
"""


def test_a_number_that_is_added_in_one_file_is_in_every_table(tmp_path):
    package = tmp_path / "magus_anharmonic"
    shutil.copytree(
        ROOT / "magus_anharmonic", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    file = package / "sscha" / "record.py"
    source = file.read_text()
    place = "    error_vector: tuple[float, ...] | None = None\n"
    assert source.count(place) == 1
    file.write_text(source.replace(place, NEW + place))
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    ran = subprocess.run(
        [sys.executable, "-c", f"DOCS = {str(ROOT / 'docs' / 'make_columns.py')!r}\n{SCRIPT}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_a_candidate_is_read_as_it_was_written(tmp_path):
    rows = [
        a_candidate("a", h3s(), "stable", gibbs=-1.25, gibbs_error=0.001, hessian_deciding=120.0),
        a_candidate("b", h3s(3.3), "failed", reason="it melted", enthalpy=-1.5, rank_static=1),
    ]
    write_ranking(tmp_path / "ranking.csv", rows)
    found = read_ranking(tmp_path / "ranking.csv")
    assert [(one.id, one.formula, one.natoms, one.atoms) for one in found] == [
        ("a", "H3S", 4, None),
        ("b", "H3S", 4, None),
    ]
    assert [one.free_energy for one in found] == [one.free_energy for one in rows]
    assert found[1].rank_static == 1 and found[1].enthalpy == -1.5


def test_tables_and_records_of_earlier_versions_are_read(tmp_path):
    write_ranking(tmp_path / "ranking.csv", [a_candidate("a", h3s(), "converged", gibbs=-1.0)])
    text = (tmp_path / "ranking.csv").read_text()
    (tmp_path / SUMS).unlink()
    old = text.replace("predicted_decrease_", "decrease_").replace("converged", "sscha")
    assert old != text
    (tmp_path / "ranking.csv").write_text(old)
    (row,) = read_ranking(tmp_path / "ranking.csv")
    assert row.status == "converged" and row.ranked
    key = Key("m", 0.0, 0.0, "s")
    stored = stored_run("a", key, h3s(), gibbs=-1.0, space_group="Im-3m (229)").stored()
    for new, before in (("space_group", "spg_quantum"), ("predicted_decrease", "decrease")):
        stored[before] = stored.pop(new)
    found = Run.of({**stored, "status": "sscha"}, key, h3s(), None)
    assert found.status == "converged" and found.free_energy.space_group == "Im-3m (229)"


@dataclass(frozen=True)
class Inner:
    height: float | None = column("height", "eV/atom", needed=True)


@dataclass(frozen=True)
class Outer:
    name: str = column("name", default="", needed=True)
    inner: Inner = Inner()
    count: int = column("count", default=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,count\na,1\n", ["column height_eV_per_atom is missing"]),
        ("name,height_meV\na,1\n", ["height_meV: wrong unit", "height_eV_per_atom"]),
        ("name,height_eV_per_atom\na,high\n", ["line 2: height_eV_per_atom: 'high'", "a number"]),
        ("name,height_eV_per_atom,count\na,1,1.5\n", ["line 2: count", "whole number"]),
    ],
)
def test_a_wrong_cell_or_column_is_named(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with refused(*words):
        read(Outer, tmp_path / "t.csv")


@pytest.mark.parametrize("record", [Candidate, GibbsPoint])
def test_every_column_names_code_that_is_there(record):
    named = {one.name: one.origin for one in columns_of(record) if one.origin}
    assert len(named) > 5
    assert not [name for name, place in named.items() if not locate(f"magus_anharmonic.{place}")]


def test_the_unit_is_in_the_name_of_a_column():
    @dataclass(frozen=True)
    class Units:
        volume: float = column("volume", "A^3/atom", default=0.0)
        density: float = column("density", "g/cm^3", default=0.0)
        lowest: float = column("frequency", "cm^-1", default=0.0)

    assert columns(Units) == ("volume_A3_per_atom", "density_g_per_cm3", "lowest_cm1")


def test_a_record_in_a_record_has_its_columns_in_its_place(tmp_path):
    assert columns(Outer) == ("name", "height_eV_per_atom", "count")
    rows = [Outer("a", Inner(1.5), 2), Outer("b", Inner(None))]
    write(Outer, tmp_path / "t.csv", rows)
    assert read(Outer, tmp_path / "t.csv") == rows
    names = columns(Candidate)
    assert len(set(names)) == len(names), "a column stands for one number"
