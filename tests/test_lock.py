"""Two processes never work in one folder, and a dead one keeps nobody out."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from waiting import wait_for

from magus_anharmonic.errors import InputError, LostLock, MagusAnharmonicError
from magus_anharmonic.io.files import TEMPORARY, append_jsonl, remove, set_aside, write_text
from magus_anharmonic.runs import lock
from magus_anharmonic.runs.lock import NAME, Owner, check_free, locked, read_owner
from magus_anharmonic.scheduler import LocalScheduler

HOLD = """
import sys, time
from magus_anharmonic.io.files import TEMPORARY
from magus_anharmonic.runs.lock import locked
with locked(sys.argv[1], "a search"):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def elsewhere(folder, **changes):
    """A lock of a process on another machine."""
    with locked(folder, "a search") as mine:
        owner = replace(
            mine, **{"host": "node7", "machine": "another boot", "token": "f" * 12, **changes}
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(asdict(owner)))
    return owner


def dead(folder):
    """A lock that a process of this machine has left."""
    with locked(folder, "a search") as mine:
        owner = replace(mine, born=mine.born - 1, token="0" * 12)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(asdict(owner)))
    return owner


def test_the_second_process_is_told_who_works_there_and_the_first_is_not_disturbed(tmp_path):
    first = holder(tmp_path)
    before = (tmp_path / NAME).read_text()
    try:
        with pytest.raises(
            InputError,
            match=(
                rf"another process works here: a search, process {first.pid} on \S+, since .*\(0"
                r" min\)"
            ),
        ):
            locked(tmp_path, "another").__enter__()
        assert (tmp_path / NAME).read_text() == before
    finally:
        first.kill()
        first.wait()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, caplog):
    first = holder(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with locked(tmp_path, "another") as owner:
        assert owner.pid == os.getpid() and f"process {first.pid}" in caplog.text
    assert not (tmp_path / NAME).exists()


def test_what_a_killed_process_had_begun_to_write_goes_with_its_lock(tmp_path):
    for name in (
        f".gen2-x.traj{TEMPORARY}",
        f"structures/.making-x{TEMPORARY}/Al.cif",
        "finished.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    first = holder(tmp_path)
    with locked(tmp_path, "another checkpoint", f"other.{NAME}"):
        assert (tmp_path / f".gen2-x.traj{TEMPORARY}").exists(), "its owner lives"
    first.send_signal(signal.SIGKILL)
    first.wait()
    with locked(tmp_path, "another"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "finished.csv",
            NAME,
            "structures",
        ]
        assert not list((tmp_path / "structures").iterdir())


def test_what_belongs_to_other_programs_or_to_somebody_who_lives_outlasts_the_lock_of_a_dead_process(
    tmp_path,
):
    foreign = [tmp_path / "mine/.swap.tmp", tmp_path / ".cache.tmp/x"]
    running = (
        tmp_path / f"results/anharmonic/.run-x.json{TEMPORARY}",
        tmp_path / f"results/.raw1-x.traj{TEMPORARY}",
    )
    training = tmp_path / f"models/.a-x.pth{TEMPORARY}"
    other = tmp_path / f"far/.gen1-x.traj{TEMPORARY}"
    left = [
        tmp_path / f".ranking-x.csv{TEMPORARY}",
        tmp_path / f"deep/er/.free-x.db{TEMPORARY}-journal",
        tmp_path / f"old/.a{TEMPORARY}",
    ]
    for path in (*foreign, *running, training, other, *left):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    dead(tmp_path)
    dead(tmp_path / "old")
    elsewhere(tmp_path / "far")
    search, training_lock = (
        locked(tmp_path / "results/anharmonic", "a search"),
        locked(tmp_path / "models", "a training", f"a.{NAME}"),
    )
    with search, training_lock, locked(tmp_path, "a ranking"):
        assert all(path.exists() for path in (*foreign, *running, training, other))
        assert not any(path.exists() for path in left)


def test_a_process_id_that_was_given_to_somebody_else_is_not_the_owner(tmp_path):
    with locked(tmp_path, "a search") as owner:
        pass
    (tmp_path / NAME).write_text(
        json.dumps(asdict(replace(owner, born=owner.born - 1, token="0" * 12)))
    )
    check_free(tmp_path)


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path, "a search"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_made_for_the_lock_alone_goes_with_it(tmp_path):
    with locked(tmp_path / "a" / "b", "a search"):
        assert (tmp_path / "a" / "b" / NAME).exists()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b", "a search"):
        (tmp_path / "a" / "result").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


def test_locks_of_different_names_in_a_folder_keep_nobody_out(tmp_path):
    with (
        locked(tmp_path, "a training", "a.lock.json"),
        locked(tmp_path, "another", "b.lock.json"),
        locked(tmp_path, "a search"),
    ):
        with pytest.raises(
            InputError,
            match=r"a\.\*: another process writes these files: a training, process \d+ on",
        ):
            locked(tmp_path, "a third", "a.lock.json").__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "a"}', '{"host": 3, "pid": "x"}'])
def test_a_damaged_lock_keeps_nobody_out(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with locked(tmp_path, "a search"):
        assert read_owner(tmp_path) is not None


def test_an_owner_on_another_machine_is_dead_when_its_heart_does_not_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    elsewhere(
        tmp_path, since="2999-01-01T00:00:00+00:00"
    )  # a clock that is wrong, or was set back since
    with locked(tmp_path, "another"):
        pass


def test_who_took_the_lock_after_it_was_looked_at_keeps_it_from_another_machine_too(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    check = lock.check_free
    owners = [elsewhere(tmp_path), elsewhere(tmp_path, token="e" * 12), elsewhere(tmp_path, beat=7)]
    for seen, now in zip([None, *owners[:2]], owners, strict=True):
        (tmp_path / NAME).unlink(missing_ok=True)
        if seen is not None:
            (tmp_path / NAME).write_text(json.dumps(asdict(seen)))

        def then_somebody_comes(folder, name, now=now):
            found = check(folder, name)
            (tmp_path / NAME).write_text(json.dumps(asdict(now)))
            return found

        monkeypatch.setattr(lock, "check_free", then_somebody_comes)
        with pytest.raises(InputError, match="on node7"):
            locked(tmp_path, "another").__enter__()
        assert read_owner(tmp_path) == now


def test_an_unreadable_moment_of_a_lock_is_not_the_death_of_its_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 3.0)
    owner = elsewhere(tmp_path)
    answers = [owner, None, OSError(errno.ESTALE, "Stale file handle"), replace(owner, beat=2)]

    def flaky(*_):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(lock, "read_owner", flaky)
    with pytest.raises(InputError, match="on node7"):
        check_free(tmp_path)
    assert not answers


def test_a_lock_that_cannot_be_read_is_an_error_and_not_a_free_folder(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / NAME))

    elsewhere(tmp_path)
    monkeypatch.setattr(lock, "read_owner", denied)
    with pytest.raises(PermissionError):
        locked(tmp_path, "another").__enter__()


def test_a_lock_of_a_later_version_with_more_fields_is_a_lock(tmp_path):
    with locked(tmp_path, "a search of a later version") as owner:
        (tmp_path / NAME).write_text(json.dumps(asdict(owner) | {"command": "x"}))
        with pytest.raises(InputError, match="a search of a later version"):
            locked(tmp_path, "another").__enter__()


def test_an_owner_on_another_machine_that_shows_a_sign_of_life_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 3.0)
    owner = elsewhere(tmp_path)
    text = json.dumps(asdict(replace(owner, beat=2)))
    beat = threading.Timer(0.3, lambda: (tmp_path / NAME).write_text(text))
    beat.start()
    with pytest.raises(InputError, match="on node7"):
        locked(tmp_path, "another").__enter__()
    beat.join()


def test_the_heart_beats_and_a_lost_lock_stops_the_loser(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    with pytest.raises(LostLock), locked(tmp_path, "a search") as owner:
        wait_for(
            lambda: (found := read_owner(tmp_path)) is not None and found.beat > 2, "no beats", 30
        )
        thief = replace(owner, token="f" * 12)
        for _ in range(200):
            (tmp_path / NAME).write_text(json.dumps(asdict(thief)))
            time.sleep(0.05)
    left = read_owner(tmp_path)
    assert left is not None and left.token == thief.token, (
        "the loser must not remove the lock of its successor"
    )


WRITERS = {
    "write": lambda file: write_text(file, "old owner"),
    "append": lambda file: append_jsonl(file, {"by": "old owner"}),
    "remove": remove,
    "set aside": lambda file: set_aside(file, "damaged"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("now", ["another's", "released", "damaged", "moved away"])
def test_an_owner_whose_token_is_gone_changes_no_file_any_more(tmp_path, now, write):
    folder, results = tmp_path / "results/anharmonic", tmp_path / "results"
    folder.mkdir(parents=True)
    (results / "best.traj").write_text("new owner")
    outside = tmp_path / "other/best.traj"
    with locked(folder, "a search") as mine:
        write_text(results / "gen1.traj", "mine")
        if now == "another's":
            (folder / NAME).write_text(json.dumps(asdict(replace(mine, token="f" * 12))))
        elif now == "moved away":  # as a new search does with the results of an earlier one
            results.rename(tmp_path / "results1")
            folder.mkdir(parents=True)
            (results / "best.traj").write_text("new owner")
        else:
            (folder / NAME).unlink() if now == "released" else (folder / NAME).write_text("{")
        with pytest.raises(LostLock, match=r"lost its lock, which (is gone|belongs to a search)"):
            write(results / "best.traj")
        write_text(outside, "is no file of that search")
    assert (results / "best.traj").read_text() == "new owner" and outside.exists()
    assert sorted(path.name for path in results.iterdir()) in (
        ["anharmonic", "best.traj"],
        ["anharmonic", "best.traj", "gen1.traj"],
    )
    write(results / "best.traj")


def test_a_lock_that_was_given_back_or_taken_again_by_this_process_hinders_nobody(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lock, "GRACE", 60.0)
    first = lock.FolderLock(tmp_path / "results/anharmonic", "magus search")
    (tmp_path / "results").rename(tmp_path / "results1")
    second = lock.FolderLock(tmp_path / "results/anharmonic", "magus search")
    time.sleep(0.3)
    write_text(tmp_path / "results/gen1.traj", "second")
    first.release()
    write_text(tmp_path / "results/gen2.traj", "second")
    second.release()
    write_text(tmp_path / "results/gen3.traj", "nobody's")
    assert not list(tmp_path.glob("results/*/*.json"))


OWNER = """
import signal, sys, threading, time
from pathlib import Path
from magus_anharmonic.runs import lock
from magus_anharmonic.io.files import append_jsonl
lock.HEARTBEAT, lock.GRACE = 0.2, 1.0
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of `cmd &` in a batch script
with lock.locked(sys.argv[1], "a search"):
    for number in range(100000):
        if sys.argv[2] == "writes":
            append_jsonl(sys.argv[1] + "/generations.jsonl", {"by": "old", "number": number})
            time.sleep(0.02)
        sum(range(10000))
        if number == 3:
            print("held", flush=True)
            time.sleep(600 if sys.argv[2] == "sleeps" else 0)
"""


@pytest.mark.parametrize(
    ("busy", "new"), [("writes", "works"), ("computes", "has finished"), ("sleeps", "works")]
)
def test_a_process_that_was_stopped_and_taken_over_writes_nothing_when_it_wakes_and_ends_though_it_ignores_sigint(
    tmp_path, monkeypatch, busy, new
):
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    monkeypatch.setattr(lock, "GUARD", 0.2)
    monkeypatch.setattr(
        Owner, "here", property(lambda self: self.pid == os.getpid())
    )  # another host, or another container
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), busy], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with contextlib.ExitStack() as stack:
            for _ in range(50):  # one that was stopped in the middle of a write is not taken over
                process.send_signal(signal.SIGSTOP)
                with contextlib.suppress(InputError):
                    stack.enter_context(locked(tmp_path, "another"))
                    break
                process.send_signal(signal.SIGCONT)
                time.sleep(0.05)
            append_jsonl(tmp_path / "generations.jsonl", {"by": "new"})
            if new == "has finished":
                stack.close()
            after = {
                path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != NAME
            }
            process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=20) == 1
            assert {
                path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != NAME
            } == after
            found = read_owner(tmp_path)
            assert (found is None) == (new == "has finished") and (
                found is None or found.pid == os.getpid()
            )
    finally:
        process.kill()
        process.wait()


def test_a_process_that_was_stopped_in_the_middle_of_a_write_is_not_taken_over(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    monkeypatch.setattr(lock, "GUARD", 0.3)
    elsewhere(tmp_path)
    with (
        lock.guarded(tmp_path, shared=True),
        pytest.raises(InputError, match="in the middle of a write here"),
    ):
        locked(tmp_path, "another").__enter__()


TIGHT = """
import resource, sys
from magus_anharmonic.runs import lock
from magus_anharmonic.errors import MachineError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
try:
    with lock.locked(sys.argv[1], "a search"):
        print("held")
except (MachineError, MemoryError) as error:
    print("refused", error)
"""


@pytest.mark.parametrize("left", [0, 1 << 18, 1 << 22, 1 << 24])
def test_a_heart_that_cannot_begin_to_beat_for_want_of_memory_is_an_error_and_not_a_wait_for_ever(
    tmp_path, left
):
    done = subprocess.run(
        [sys.executable, "-c", TIGHT, str(tmp_path / "run"), str(left)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ},
    )
    assert done.stdout.startswith(("held", "refused")) or "MemoryError" in done.stderr, done.stderr
    assert not (tmp_path / "run" / NAME).exists()


def test_no_thread_for_the_heart_gives_the_lock_back_with_one_clear_error(tmp_path, monkeypatch):
    def none_left(*arguments):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", none_left)
    with pytest.raises(
        MagusAnharmonicError,
        match=r"no thread for the heartbeat of its lock \(can't start new thread\); allow",
    ):
        locked(tmp_path / "run", "a search").__enter__()
    monkeypatch.setattr("_thread.start_new_thread", lambda *arguments: 0)
    monkeypatch.setattr(lock, "HEARTBEAT_START", 0.1)
    with pytest.raises(MagusAnharmonicError, match="it did not begin"):
        locked(tmp_path / "run", "a search").__enter__()
    assert not (tmp_path / "run").exists() and not lock.claims()


def steps_of(item, shared=None):
    """A task that writes in a folder until it may not."""
    for number in range(1000):
        append_jsonl(Path(item) / "steps.jsonl", {"number": number})
        if number == 3:
            owner = read_owner(item)
            assert owner is not None and owner.pid != os.getpid()
            (Path(item) / NAME).write_text(json.dumps(asdict(replace(owner, token="f" * 12))))
    return number


def test_workers_of_an_owner_write_under_its_lock_and_no_longer(tmp_path):
    with contextlib.closing(LocalScheduler(1)) as scheduler, locked(tmp_path, "a search"):
        with pytest.raises(MagusAnharmonicError, match="lost its lock"):
            list(scheduler.map(steps_of, [str(tmp_path)]))
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="skipped: needs root and unshare"
)
@pytest.mark.parametrize("options", [["--mount-proc"], []])
def test_an_owner_in_another_process_namespace_is_told_by_its_heart_alone(
    tmp_path, monkeypatch, options
):
    monkeypatch.setattr(lock, "PATIENCE", 3.0)
    program = OWNER.replace("if number == 3", "if number == 0")
    command = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        *options,
        sys.executable,
        "-c",
        program,
        str(tmp_path),
        "computes",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        owner = read_owner(tmp_path)
        assert owner is not None and owner.pid == 1 and owner.alive is None
        with pytest.raises(InputError, match="another process works here"):
            locked(tmp_path, "another").__enter__()
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path, "another"):
        pass
