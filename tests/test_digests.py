"""One changed digit in what is read back as a number is found and named; what the folders of runs hold is never lost with the database."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

from magus_anharmonic.errors import DamagedFile, InputError
from magus_anharmonic.files import append_jsonl, read_json, read_jsonl, write_json
from magus_anharmonic.ranking.store import NAME, FreeEnergyStore, Key, Record
from magus_anharmonic.run_record import read_run_record, write_run_record
from magus_anharmonic.search.archive import append_frames, read_frames, write_frames
from magus_anharmonic.settings import parse_settings


def test_a_changed_digit_of_a_json_object_is_named(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_json(file, {"gibbs": -0.0729, "rows": [1, {"x": np.float64(0.25)}], "nothing": None, "not": float("nan")})
    assert read_json(file)["gibbs"] == -0.0729 and "sha256" not in read_json(file)
    file.write_text(file.read_text().replace("0729", "0728"))
    with pytest.raises(DamagedFile, match=r"result\.json.*changed"):
        read_json(file)


def test_a_changed_digit_of_a_line_is_named_and_the_line_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for generation in (1, 2):
        append_jsonl(tmp_path / "lines.jsonl", {"generation": generation, "ratio": 2.5})
    assert read_jsonl(tmp_path / "lines.jsonl") == [{"generation": 1, "ratio": 2.5}, {"generation": 2, "ratio": 2.5}]
    text = (tmp_path / "lines.jsonl").read_text()
    (tmp_path / "lines.jsonl").write_text(text.replace("2.5", "2.6", 1))
    assert read_jsonl(tmp_path / "lines.jsonl") == [{"generation": 2, "ratio": 2.5}]
    assert "line 1: damaged" in caplog.text


def test_the_seed_of_a_run_cannot_change(tmp_path: Path) -> None:
    write_run_record(tmp_path, parse_settings({}), seed=17, model_id=None)
    file = tmp_path / "run.json"
    file.write_text(file.read_text().replace('"seed": 17', '"seed": 18'))
    with pytest.raises(InputError, match=r"run\.json.*changed"):
        read_run_record(tmp_path)


def test_a_changed_byte_of_a_trajectory_is_named(tmp_path: Path) -> None:
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


def records(n: int = 3) -> list[Record]:
    key = Key("1234e5678901", 150.0, 0.0, "settings")
    return [
        Record(
            f"abc{i}", key, bulk("Cu", a=3.6 + 0.1 * i), "sscha", enthalpy=1.0 + i, gibbs=1.25 + i, gibbs_error=0.001, volume=11.0,
            n_evaluations=400, centroids=bulk("Cu", a=3.61 + 0.1 * i), error_vector=(0.25, 1.0),
        )
        for i in range(n)
    ]  # fmt: skip


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def digit(file: Path) -> None:
    with sqlite3.connect(file) as database:
        assert database.execute("update systems set positions = ? where id = 1", (np.full(3, 0.5).tobytes(),)).rowcount == 1


def number(file: Path) -> None:
    content = file.read_bytes()
    assert b"1.25" in content or np.float64(1.25).tobytes() in content
    file.write_bytes(content.replace(b"1.25", b"1.24").replace(np.float64(1.25).tobytes(), np.float64(1.24).tobytes()))


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b""), Path.unlink, cut, digit, number])
def test_a_database_that_is_empty_cut_or_changed_is_made_again_from_the_runs(tmp_path: Path, damage, caplog) -> None:
    file = tmp_path / NAME
    store = FreeEnergyStore(file)
    for record in records():
        store.put(record)
    whole = list(FreeEnergyStore(file).records())
    assert [record.gibbs for record in whole] == [1.25, 2.25, 3.25]
    damage(file)
    for _ in range(2):
        found = list(FreeEnergyStore(file).records())
        assert [(r.structure, r.key, r.gibbs, r.enthalpy, r.error_vector) for r in found] == [
            (r.structure, r.key, r.gibbs, r.enthalpy, r.error_vector) for r in whole
        ]
        assert np.allclose(found[0].start.positions, whole[0].start.positions) and found[0].centroids == whole[0].centroids
    assert "3 free energies were missing" in caplog.text


def test_a_changed_record_of_a_run_is_set_aside(tmp_path: Path) -> None:
    FreeEnergyStore(tmp_path / NAME).put(records(1)[0])
    (file,) = tmp_path.glob("sscha/*/record.json")
    data = json.loads(file.read_text())
    data["data"]["values"]["gibbs"] = 0.0
    file.write_text(json.dumps(data))
    (tmp_path / NAME).unlink()
    assert len(FreeEnergyStore(tmp_path / NAME)) == 0 and file.with_name("record.json.damaged").exists()


def test_failures_are_compared_with_those_before_in_time_that_grows_as_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: each new failure was compared with every earlier one, 3.5 s for 1,000 on top of 20,000."""
    from magus_anharmonic import failures

    asked = 0
    original = failures.identity

    def counted(record):
        nonlocal asked
        asked += 1
        return original(record)

    many = [{"generation": np.int64(1), "id": f"init1-{i}", "reason": "overlap"} for i in range(200)]
    failures.record_failures(tmp_path, "relaxation", many)
    monkeypatch.setattr(failures, "identity", counted)
    failures.record_failures(tmp_path, "relaxation", [*many[:50], {"id": "new", "reason": "overlap"}])
    assert len(failures.read_failures(tmp_path)) == 201 and asked == 251


def test_a_record_of_a_run_with_masses_of_its_own_is_taken_back(tmp_path):
    heavy = bulk("Al")
    heavy.set_masses([26.0])
    key = Key("emt", 0.0, 0.0, "0" * 12)
    FreeEnergyStore(tmp_path / NAME).put(Record("a" * 12, key, heavy, "sscha", gibbs=-1.0, centroids=heavy))
    (tmp_path / NAME).unlink()
    (record,) = FreeEnergyStore(tmp_path / NAME).records()
    assert record.gibbs == -1.0 and record.start.get_masses().tolist() == record.phase.get_masses().tolist() == [26.0]
