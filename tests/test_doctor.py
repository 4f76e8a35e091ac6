"""The doctor tells apart what is missing, what is missing and needed, and what is only worth
knowing."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from magus_anharmonic import doctor
from magus_anharmonic.doctor import collect, exit_code, find_magus
from magus_anharmonic.settings import parse_settings


@pytest.fixture
def labelers(monkeypatch):
    """The answers of the labelers, to be set by a test, instead of what this machine happens to
    have."""
    answers = {
        "gpaw": (True, "gpaw 26.7.0"),
        "vasp": (False, "no ASE_VASP_COMMAND"),
        "espresso": (False, "no pw.x"),
    }

    def code_of(name):
        return SimpleNamespace(
            available=lambda execution=None: answers.get(name, (False, f"{name} unknown"))
        )

    monkeypatch.setattr("magus_anharmonic.labelers.code_of", code_of)
    return answers


def test_a_command_in_the_input_counts_when_a_labeler_is_looked_for(no_magus, monkeypatch):
    monkeypatch.setenv("PATH", "")
    block = {
        "calculator": "espresso",
        "arguments": {"command": f"{sys.executable} pw.py", "pseudopotentials": {"H": "H.upf"}},
    }
    check = doctor._labelers(parse_settings({"learning": {"labeler": block}}))[0]
    assert (check.name, check.ok, check.needed) == ("labeler espresso", True, True)


@pytest.fixture
def no_magus(monkeypatch):
    monkeypatch.setattr(doctor, "find_magus", lambda: (None, "not found"))


def settings_with(checkpoint, labeler=None, **more):
    data = {
        "symbols": ["H", "S"],
        "MainCalculator": {"calculator": "mattersim", "checkpoint": checkpoint},
        **more,
    }
    if labeler:
        data["learning"] = {"labeler": {"calculator": labeler}}
    return parse_settings(data)


def named(checks, name):
    return next(check for check in checks if check.name == name)


def test_without_an_input_nothing_optional_is_a_failure(labelers, no_magus):
    checks = collect()
    assert exit_code(checks) == 0
    assert named(checks, "labeler vasp").ok is None
    assert (
        named(checks, "MAGUS").ok is None and "gitlab.com/bigd4/magus" in named(checks, "MAGUS").fix
    )
    assert named(checks, "SSCHA engine python-sscha").ok is True
    assert named(checks, "torch").ok is True


def test_a_needed_labeler_that_is_missing_fails_and_says_what_to_do(
    labelers, no_magus, tiny_checkpoint
):
    present = settings_with(str(tiny_checkpoint), "gpaw")
    assert exit_code(collect(present)) == 0
    labelers["gpaw"] = (False, "gpaw is not installed")
    checks = collect(present)
    assert exit_code(checks) == 1
    assert "magus-anharmonic[gpaw]" in named(checks, "labeler gpaw").fix


def test_a_found_checkpoint_is_named_by_the_id_of_its_weights(labelers, no_magus, tiny_checkpoint):
    from magus_anharmonic.potential.checkpoint import describe

    check = named(collect(settings_with(str(tiny_checkpoint))), "checkpoint")
    assert check.ok is True and describe(tiny_checkpoint).model_id in check.detail


def test_a_missing_or_truncated_checkpoint_fails(labelers, no_magus, tiny_checkpoint, tmp_path):
    assert exit_code(collect(settings_with("nowhere.pth"))) == 1
    short = tmp_path / "short.pth"
    short.write_bytes(Path(tiny_checkpoint).read_bytes()[:1000])
    checks = collect(settings_with(str(short)))
    assert exit_code(checks) == 1
    assert "truncated" in named(checks, "checkpoint").detail


def test_a_mattersim_checkpoint_is_looked_for_but_never_fetched(
    labelers, no_magus, monkeypatch, tmp_path
):
    from magus_anharmonic.potential import checkpoint

    def fetch(*_):
        raise AssertionError("the doctor must not download")

    monkeypatch.setattr(checkpoint, "_download", fetch)
    monkeypatch.setattr(checkpoint, "mattersim_folder", lambda: tmp_path)
    check = named(collect(settings_with("mattersim-v1.0.0-1M")), "checkpoint")
    assert check.ok is False and check.needed
    assert str(tmp_path) in check.fix and "mattersim-v1.0.0-1M.pth" in check.fix


def test_a_device_that_is_not_there_fails_only_when_asked_for(labelers, no_magus):
    asked = parse_settings({"MainCalculator": {"calculator": "mattersim", "device": "cuda"}})
    assert doctor._device(asked, None).ok is False and doctor._device(asked, None).needed
    assert doctor._device(None, None).ok is None
    assert doctor._device(asked, "NVIDIA X").ok is True


def package(folder, *, entrypoints):
    (folder / "magus").mkdir()
    (folder / "magus" / "__init__.py").write_text(
        "__version__ = '9.9.9'\nraise RuntimeError('must not be imported')\n"
    )
    if entrypoints:
        (folder / "magus" / "entrypoints").mkdir()


@pytest.mark.parametrize("real", [True, False])
def test_another_package_of_the_same_name_is_not_taken_for_magus(real, tmp_path, monkeypatch):
    package(tmp_path, entrypoints=real)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "magus", raising=False)
    version, text = find_magus()
    assert version == ("9.9.9" if real else None)
    assert real or "not MAGUS" in text


def test_a_magus_that_does_not_import_is_reported_with_its_reason(tmp_path, monkeypatch):
    package(tmp_path, entrypoints=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "magus", raising=False)
    seen = named(doctor._magus(), "MAGUS sees")
    assert seen.ok is False and "must not be imported" in seen.detail


# ------------------------------------------------------------------ the scheduler


def scheduler_check(**keys):
    return doctor._scheduler(parse_settings(keys))


def test_local_processes_need_nothing():
    check = scheduler_check(workers={"count": 3})
    assert check.ok and check.detail == "local: 3 processes on this machine"


def test_a_queue_system_needs_its_commands(monkeypatch, tmp_path):
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("PATH", str(tmp_path))
    check = scheduler_check(scheduler="slurm")
    assert (
        check.ok is False
        and check.needed
        and "no command sbatch and no scancel here" in check.detail
    )
    for name in ("sbatch", "scancel"):
        (tmp_path / name).write_text("#!/bin/sh")
        (tmp_path / name).chmod(0o755)
    assert (
        scheduler_check(scheduler="slurm", workers={"count": 4}).detail == "slurm: 4 jobs by sbatch"
    )
    assert "queue systems with commands here: slurm" in doctor._scheduler(None).detail


def test_an_address_is_tried():
    import socket

    pytest.importorskip("distributed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert scheduler_check(scheduler=address).ok
    check = scheduler_check(scheduler=address)
    assert (
        check.ok is False
        and "nobody answers there" in check.detail
        and "dask scheduler" in check.detail
    )


def test_a_labeler_of_workers_elsewhere_is_not_missing_here(labelers):
    block = {"labeler": {"calculator": "vasp"}}
    here, elsewhere = (
        doctor._labelers(parse_settings({"learning": block, "scheduler": name}))[0]
        for name in ("local", "slurm")
    )
    assert here.ok is False and here.needed and elsewhere.ok is None and not elsewhere.needed
