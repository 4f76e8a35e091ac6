"""``run.json`` says what made the results, and protects them from another version."""

import json

import pytest

import magus_anharmonic
from magus_anharmonic.errors import InputError
from magus_anharmonic.runs.record import (
    check_results_version,
    read_run_record,
    settings_hash,
    write_run_record,
)
from magus_anharmonic.settings import parse_settings


def test_the_record_holds_resolved_settings_versions_seed_and_model(tmp_path):
    settings = parse_settings({"pressure": 150, "sscha": {}, "popSize": 8})
    write_run_record(
        tmp_path, settings, seed=7, model_id="0123456789ab", extra={"host": "embedded"}
    )
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["sscha"]["n_configs"] == 1000, "defaults are written out"
    assert record["settings"]["host"] == {"popSize": 8}
    assert (record["seed"], record["model"], record["host"]) == (7, "0123456789ab", "embedded")
    assert (
        record["packages"]["ase"]
        and record["packages"]["magus-anharmonic"] == magus_anharmonic.__version__
    )
    assert record["python"].startswith("3.")


def test_a_second_start_keeps_the_record_of_the_first(tmp_path):
    for seed in (1, 2, 3):
        write_run_record(tmp_path, parse_settings({"seed": seed}), seed=seed, model_id=None)
    record = read_run_record(tmp_path)
    assert record.seed == 3
    assert [earlier["seed"] for earlier in record.earlier_starts] == [1, 2]


def test_the_settings_hash_sees_values_not_their_order():
    one = parse_settings({"pressure": 150, "seed": 1})
    assert settings_hash(one) == settings_hash(parse_settings({"seed": 1, "pressure": 150.0}))
    assert settings_hash(one) != settings_hash(parse_settings({"pressure": 151, "seed": 1}))


def test_results_of_another_version_are_refused_with_both_versions_named(tmp_path, monkeypatch):
    check_results_version(tmp_path)
    write_run_record(tmp_path, parse_settings({}), seed=0, model_id=None)
    check_results_version(tmp_path)
    major, minor, _ = magus_anharmonic.__version__.split(".")
    monkeypatch.setattr(magus_anharmonic, "__version__", f"{major}.{minor}.99")
    check_results_version(tmp_path)
    monkeypatch.setattr(magus_anharmonic, "__version__", "9.0.0")
    with pytest.raises(InputError, match=r"written by magus-anharmonic 0\.1\.0, this is 9\.0\.0"):
        check_results_version(tmp_path)


@pytest.mark.parametrize("changed", [{"physics": 0}, {"schema": 2}, {"physics": None}])
def test_a_folder_of_other_numbers_or_files_is_not_gone_on_with(tmp_path, changed):
    """Every commit called itself 0.1.0, and a free energy of a hundred commits before was taken as
    one of now."""
    record = write_run_record(tmp_path, parse_settings({}), seed=0, model_id=None) | changed
    (tmp_path / "run.json").write_text(
        json.dumps({key: value for key, value in record.items() if value is not None})
    )
    assert read_run_record(tmp_path).seed == 0
    with pytest.raises(InputError, match="report and status read it"):
        check_results_version(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 1}'])
def test_a_broken_record_is_an_input_error_not_a_traceback(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json"):
        check_results_version(tmp_path)
