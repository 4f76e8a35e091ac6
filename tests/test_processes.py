"""Programs that are started with a limit of time."""

import subprocess
import sys
import time

import psutil
import pytest

from magus_anharmonic.processes import run_bounded


def test_what_a_program_says_and_how_it_ends():
    done = run_bounded(
        [
            sys.executable,
            "-c",
            "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)",
        ],
        60.0,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_who_holds_the_pipes_of_an_ended_program_is_neither_waited_for_nor_left(tmp_path):
    """A compiler's driver is ended, and the compiler that it started goes on and holds the pipe."""
    file = tmp_path / "pid"
    inner = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    outer = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}],"
        " start_new_session=True)"
    )
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_bounded([sys.executable, "-c", outer], 10.0)
    assert time.monotonic() - begun < 60.0, "the inner one sleeps for ten minutes"
    pid = int(file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
