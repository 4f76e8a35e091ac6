"""One changed digit in what is read back as a number is found and named; what the folders of runs
hold is never lost with the database."""

import csv
import json
import sqlite3
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from campaign_tables import read_rows
from records import a_candidate, stored_run
from synthetic_campaign import synthetic_campaign
from two_phases import HIGH, LOW, data
from typer.testing import CliRunner

from magus_anharmonic.campaign.production import read_statics
from magus_anharmonic.campaign.steps import assemble, structure_file, write_part
from magus_anharmonic.cli import app
from magus_anharmonic.errors import DamagedFile, InputError
from magus_anharmonic.generation import measured_terms
from magus_anharmonic.io import files
from magus_anharmonic.io.files import (
    SUMS,
    append_jsonl,
    load_arrays,
    read_json,
    read_jsonl,
    remove,
    replacing_table,
    write_json,
)
from magus_anharmonic.io.tables import table_rows, write_table
from magus_anharmonic.paper import tables
from magus_anharmonic.phase_diagram.points import write_points
from magus_anharmonic.ranking.candidate import read_ranking, write_ranking
from magus_anharmonic.ranking.store import FreeEnergyStore, Key
from magus_anharmonic.report import write_report
from magus_anharmonic.runs.record import read_run_record, write_run_record
from magus_anharmonic.search.archive import append_frames, read_frames, write_frames
from magus_anharmonic.settings import parse_settings


def test_a_changed_digit_of_a_json_object_is_named(tmp_path):
    file = tmp_path / "result.json"
    write_json(
        file,
        {
            "gibbs": -0.0729,
            "rows": [1, {"x": np.float64(0.25)}],
            "nothing": None,
            "not": float("nan"),
        },
    )
    assert read_json(file)["gibbs"] == -0.0729 and "sha256" not in read_json(file)
    file.write_text(file.read_text().replace("0729", "0728"))
    with pytest.raises(DamagedFile, match=r"result\.json.*changed"):
        read_json(file)


def test_a_changed_digit_of_a_line_is_named_and_the_line_left_out(tmp_path, caplog):
    for generation in (1, 2):
        append_jsonl(tmp_path / "lines.jsonl", {"generation": generation, "ratio": 2.5})
    assert read_jsonl(tmp_path / "lines.jsonl") == [
        {"generation": 1, "ratio": 2.5},
        {"generation": 2, "ratio": 2.5},
    ]
    text = (tmp_path / "lines.jsonl").read_text()
    (tmp_path / "lines.jsonl").write_text(text.replace("2.5", "2.6", 1))
    assert read_jsonl(tmp_path / "lines.jsonl") == [{"generation": 2, "ratio": 2.5}]
    assert "line 1: damaged" in caplog.text


def test_the_seed_of_a_run_cannot_change(tmp_path):
    write_run_record(tmp_path, parse_settings({}), seed=17, model_id=None)
    file = tmp_path / "run.json"
    file.write_text(file.read_text().replace('"seed": 17', '"seed": 18'))
    with pytest.raises(InputError, match=r"run\.json.*changed"):
        read_run_record(tmp_path)


def test_a_changed_byte_of_a_trajectory_is_named(tmp_path):
    file = tmp_path / "good2.traj"
    write_frames(file, [bulk("Cu", a=3.6), bulk("Cu", a=3.7).repeat((2, 1, 1))])
    assert [len(atoms) for atoms in read_frames(file)] == [1, 2]
    content = file.read_bytes()
    place = content.index(np.float64(1.85).tobytes())
    file.write_bytes(content[:place] + np.float64(1.86).tobytes() + content[place + 8 :])
    with pytest.raises(DamagedFile, match=r"good2\.traj.*changed"):
        read_frames(file)
    append_frames(tmp_path / "other.traj", [bulk("Al")])
    assert len(read_frames(tmp_path / "other.traj")) == 1


def records(n=3):
    key = Key("1234e5678901", 150.0, 0.0, "settings")
    return [
        stored_run(
            f"abc{i}",
            key,
            bulk("Cu", a=3.6 + 0.1 * i),
            "converged",
            enthalpy=1.0 + i,
            gibbs=1.25 + i,
            gibbs_error=0.001,
            volume=11.0,
            n_evaluations=400,
            centroids=bulk("Cu", a=3.61 + 0.1 * i),
            error_vector=(0.25, 1.0),
        )
        for i in range(n)
    ]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def digit(file):
    with sqlite3.connect(file) as database:
        assert (
            database.execute(
                "update systems set positions = ? where id = 1", (np.full(3, 0.5).tobytes(),)
            ).rowcount
            == 1
        )


def number(file):
    content = file.read_bytes()
    assert b"1.25" in content or np.float64(1.25).tobytes() in content
    file.write_bytes(
        content.replace(b"1.25", b"1.24").replace(
            np.float64(1.25).tobytes(), np.float64(1.24).tobytes()
        )
    )


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(b""), Path.unlink, cut, digit, number]
)
def test_a_database_that_is_empty_cut_or_changed_is_made_again_from_the_runs(
    tmp_path, damage, caplog
):
    file = tmp_path / "free_energies.db"
    store = FreeEnergyStore(file)
    for record in records():
        store.put(record)
    whole = list(FreeEnergyStore(file).runs())
    assert [record.gibbs for record in whole] == [1.25, 2.25, 3.25]
    damage(file)
    for _ in range(2):
        found = list(FreeEnergyStore(file).runs())
        assert [
            (r.structure, r.key, r.gibbs, r.enthalpy, r.free_energy.error_vector) for r in found
        ] == [(r.structure, r.key, r.gibbs, r.enthalpy, r.free_energy.error_vector) for r in whole]
        assert (
            np.allclose(found[0].start.positions, whole[0].start.positions)
            and found[0].centroids == whole[0].centroids
        )
    assert "3 free energies were missing" in caplog.text


def test_a_changed_record_of_a_run_is_set_aside(tmp_path):
    FreeEnergyStore(tmp_path / "free_energies.db").put(records(1)[0])
    (file,) = tmp_path.glob("sscha/*/record.json")
    data = json.loads(file.read_text())
    data["data"]["values"]["gibbs"] = 0.0
    file.write_text(json.dumps(data))
    (tmp_path / "free_energies.db").unlink()
    assert (
        len(FreeEnergyStore(tmp_path / "free_energies.db")) == 0
        and file.with_name("record.json.damaged").exists()
    )


def test_failures_are_compared_with_those_before_in_time_that_grows_as_their_number(
    tmp_path, monkeypatch
):
    """The fault: each new failure was compared with every earlier one, 3.5 s for 1,000 on top of
    20,000."""
    from magus_anharmonic.runs import record as failures

    asked = 0
    original = failures.identity

    def counted(record):
        nonlocal asked
        asked += 1
        return original(record)

    many = [
        {"generation": np.int64(1), "id": f"init1-{i}", "reason": "overlap"} for i in range(200)
    ]
    failures.record_failures(tmp_path, "relaxation", many)
    monkeypatch.setattr(failures, "identity", counted)
    failures.record_failures(
        tmp_path, "relaxation", [*many[:50], {"id": "new", "reason": "overlap"}]
    )
    assert len(failures.read_failures(tmp_path)) == 201 and asked == 251


CHANGED = "changed since it was written"


def change(file, old, new):
    text = file.read_text()
    assert old in text and len(old) == len(new)
    file.write_text(text.replace(old, new, 1))


def checked(folder):
    return subprocess.run(
        ["sha256sum", "--strict", "-c", SUMS], cwd=folder, capture_output=True
    ).returncode


def test_the_digests_of_tables_are_those_of_sha256sum_and_go_with_their_tables(tmp_path):
    write_table(tmp_path / "a.csv", ("n",), [[1], [2]])
    write_table(tmp_path / "b c.csv", ("n",), [[3]])
    (tmp_path / "users.csv").write_text("n\n4\n")
    assert checked(tmp_path) == 0 and [
        line[66:] for line in (tmp_path / SUMS).read_text().splitlines()
    ] == ["a.csv", "b c.csv"]
    write_table(tmp_path / "a.csv", ("n",), [[5]])
    change(tmp_path / "users.csv", "4", "6")
    assert checked(tmp_path) == 0 and [
        row["n"] for name in ("a", "users") for row in read_rows(tmp_path / f"{name}.csv")
    ] == ["5", "6"]
    change(tmp_path / "a.csv", "5", "6")
    with pytest.raises(DamagedFile, match=rf"a\.csv: {CHANGED}.*{SUMS}"):
        list(read_rows(tmp_path / "a.csv"))
    assert checked(tmp_path) != 0
    remove(tmp_path / "a.csv")
    assert checked(tmp_path) == 0
    remove(tmp_path / "b c.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["users.csv"]


def test_a_table_never_has_the_digest_of_another_state_wherever_its_writer_dies(
    tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    steps, original = 0, Path.replace

    def replace(self, target):
        nonlocal steps
        steps += 1
        if steps > allowed:
            raise Killed
        return original(self, target)

    seen = set()
    for allowed in range(4):
        monkeypatch.undo()
        for name in ("a", "other"):
            write_table(tmp_path / f"{name}.csv", ("n",), [[1]])
        steps = 0
        monkeypatch.setattr(Path, "replace", replace)
        try:
            write_table(tmp_path / "a.csv", ("n",), [[2]])
        except Killed:
            seen.add(allowed)
        with table_rows(tmp_path / "a.csv") as rows:
            assert [row["n"] for row in rows] == [["1", "1", "2", "2"][allowed]]
    assert seen == {0, 1, 2}


def test_a_table_that_is_written_while_it_is_read_is_no_damaged_one(tmp_path, monkeypatch):
    write_table(tmp_path / "a.csv", ("n",), [[1]])
    original = files._sums
    asked = 0

    def sums(folder):
        nonlocal asked
        found, asked = original(folder), asked + 1
        if asked == 1:
            with replacing_table(tmp_path / "a.csv") as temporary:
                temporary.write_text("n\n2\n")
        return found

    monkeypatch.setattr(files, "_sums", sums)
    assert [row["n"] for row in read_rows(tmp_path / "a.csv")] == ["2"] and asked > 2


def test_a_changed_digit_of_the_points_of_a_phase_diagram_ends_it(tmp_path):
    file = tmp_path / "gibbs.csv"
    write_points(file, data({"low": LOW, "high": HIGH}, 3, temperatures=(0.0,)))
    again = [
        ["phase-diagram", str(source), "-o", str(tmp_path / "out")] for source in (tmp_path, file)
    ]
    assert CliRunner().invoke(app, again[0]).exit_code == 0
    change(file, "high,natural,H3S,60,", "high,natural,H3S,61,")
    for arguments in again:
        result = CliRunner().invoke(app, arguments)
        assert (
            result.exit_code == 2
            and "gibbs.csv" in result.output
            and CHANGED in " ".join(result.output.split())
        ), result.output
    (tmp_path / SUMS).unlink()
    assert CliRunner().invoke(app, again[0]).exit_code == 0


def test_a_changed_digit_of_the_corrections_is_no_term_of_a_ranking(tmp_path):
    tables.write(
        tables.GibbsCorrection,
        tmp_path / "gibbs_correction.csv",
        [tables.GibbsCorrection("R3m", 100.0, 20, 0.015, 0.002, None)],
    )
    assert measured_terms(tmp_path, 100.0)["R3m"].correction == 0.015
    change(tmp_path / "gibbs_correction.csv", "0.015", "0.016")
    with pytest.raises(DamagedFile, match=rf"gibbs_correction\.csv: {CHANGED}"):
        measured_terms(tmp_path, 100.0)


def test_a_changed_digit_of_a_ranking_is_named_by_all_that_read_it(tmp_path):
    file = tmp_path / "ranking.csv"
    write_ranking(
        file,
        [
            a_candidate(
                name, bulk("Cu"), pressure=10.0, enthalpy=-3.25, model="m", spg_static="Fm-3m (225)"
            )
            for name in "ab"
        ],
    )
    assert [row.enthalpy for row in read_ranking(file)] == [-3.25] * 2
    change(file, "-3.250000", "-3.260000")
    with pytest.raises(DamagedFile, match=rf"ranking\.csv: {CHANGED}"):
        read_ranking(file)
    with pytest.raises(DamagedFile, match=rf"ranking\.csv: {CHANGED}"):
        list(read_rows(file))
    assert f"ranking.csv: {CHANGED}" in write_report(tmp_path).read_text()


@pytest.mark.full
def test_a_changed_digit_of_a_campaigns_tables_is_named_by_all_that_read_them(tmp_path):
    campaign = synthetic_campaign(tmp_path / "h3s", 30, pressures=(50, 100))
    (file,) = campaign.rglob("enthalpies.csv")
    with file.open(newline="") as handle:
        names, *rows = csv.reader(handle)
    write_table(file, names, rows)
    rank = {
        "name": "enthalpy_rank",
        "phase": "R3m",
        "pressure_GPa": 50,
        "value": 2,
        "unit": "1",
        "source": "a paper",
    }
    (tmp_path / "expected.yaml").write_text(json.dumps({"values": [rank]}))
    commands = [
        ["validate", str(campaign), str(tmp_path / "expected.yaml")],
        ["report", str(campaign)],
    ]
    page = campaign / "campaign" / "report.html"
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0 and CHANGED not in result.output, result.output
    assert CHANGED not in page.read_text()
    change(file, rows[0][7], "9" + rows[0][7][1:])
    for command, code in zip(commands, (2, 0), strict=True):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == code, (command, result.output)
        assert code == 0 or f"enthalpies.csv: {CHANGED}" in " ".join(result.output.split()), (
            result.output
        )
    assert f"enthalpies.csv: {CHANGED}" in page.read_text()
    with pytest.raises(DamagedFile, match=rf"enthalpies\.csv: {CHANGED}"):
        tables.read(tables.Enthalpy, file)  # as the figures do


def test_a_changed_digit_of_the_part_of_a_step_never_reaches_the_tables_of_the_campaign(tmp_path):
    write_part(tmp_path / "one", tables.Cost, [tables.Cost("learn", 10, 200, 3, 1.5)])
    assemble(tmp_path / "tables", [tmp_path / "one"])
    assert [row["n_labels"] for row in read_rows(tmp_path / "tables" / "cost.csv")] == [
        "3"
    ] and checked(tmp_path / "tables") == 0
    change(tmp_path / "one" / "tables" / "cost.csv", "200", "300")
    with pytest.raises(DamagedFile, match=rf"one/tables/cost\.csv: {CHANGED}"):
        assemble(tmp_path / "tables", [tmp_path / "one"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_bit_of_arrays_is_named(tmp_path, save):
    file = tmp_path / "start.npz"
    save(file, forces=np.random.default_rng(0).normal(size=(20, 3)))
    whole, forces = file.read_bytes(), load_arrays(file)["forces"]
    refused = 0
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert np.array_equal(load_arrays(file)["forces"], forces), place
        except (DamagedFile, KeyError):
            refused += 1
    assert refused > 500


def test_fewer_rows_than_were_written_are_no_array(tmp_path):
    """NumPy read the first 10 of 20 rows and was content: the sum of a file in a zip archive is
    compared at its end."""
    np.savez(tmp_path / "start.npz", forces=np.ones((20, 3)))
    content = (tmp_path / "start.npz").read_bytes()
    (tmp_path / "start.npz").write_bytes(content.replace(b"(20, 3)", b"(10, 3)"))
    with pytest.raises(DamagedFile, match=r"start\.npz: damaged.*forces\.npy was changed"):
        load_arrays(tmp_path / "start.npz")


def test_a_record_of_a_run_with_masses_of_its_own_is_taken_back(tmp_path):
    heavy = bulk("Al")
    heavy.set_masses([26.0])
    key = Key("emt", 0.0, 0.0, "0" * 12)
    FreeEnergyStore(tmp_path / "free_energies.db").put(
        stored_run("a" * 12, key, heavy, "converged", gibbs=-1.0, centroids=heavy)
    )
    (tmp_path / "free_energies.db").unlink()
    (record,) = FreeEnergyStore(tmp_path / "free_energies.db").runs()
    assert (
        record.gibbs == -1.0
        and record.start.get_masses().tolist() == record.phase.get_masses().tolist() == [26.0]
    )


def test_a_changed_digit_of_the_structures_of_a_step_is_named(tmp_path):
    with structure_file(tmp_path) as file:
        file.add(bulk("Al"), "aaaa", "Fm-3m (225)", 100.0, "static")
    assert len(read_statics(tmp_path)) == 1
    written = tmp_path / "tables" / "structures.extxyz"
    written.write_text(written.read_text().replace("2.025", "2.035"))
    with pytest.raises(DamagedFile, match=r"structures\.extxyz: changed since it was written"):
        read_statics(tmp_path)
    remove(written)
    assert not (tmp_path / "tables" / ".sha256sums").exists()
