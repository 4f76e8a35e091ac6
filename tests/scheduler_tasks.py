"""Tasks for the tests of schedulers, importable by worker processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ase.calculators.emt import EMT


@dataclass(frozen=True)
class Counted:
    """A shared object that leaves a line in ``file`` whenever a process makes it."""

    file: str
    key: str = "counted"

    def make(self):
        """The text that tasks see."""
        with open(self.file, "a") as out:
            out.write(f"{os.getpid()}\n")
        return "made"


class Witness(EMT):
    """EMT that leaves in ``folder`` the host and process in which it works."""

    default_parameters = {**EMT.default_parameters, "folder": "."}

    def calculate(self, *arguments):
        (Path(self.parameters.folder) / f"{socket.gethostname()} {os.getpid()}").touch()
        super().calculate(*arguments)


def square(item, shared=None):
    """The simplest task."""
    return item * item


def who(item, shared=None):
    """Process id, after ``item`` seconds, and the shared object."""
    time.sleep(item)
    return os.getpid(), shared


def with_machine_error(item, shared=None):
    """``raise`` raises, ``die`` kills its worker, anything else takes a while and is returned."""
    if item == "raise":
        raise ValueError("negative\ndensity")
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    return item


def leaves_a_program(item, shared=None):
    """Starts a program in a session of its own, whose number is in a file then, and ``die``s or
    goes on."""
    file, how = item
    code = f"import os, time; open({file!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (Path(file).is_file() and Path(file).read_text()):
        time.sleep(0.02)
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(600)
    return how


def slow_the_first_time(file, shared=None):
    """How often it has begun; the first one takes ten minutes."""
    with open(file, "a") as begun:
        begun.write("x")
    number = Path(file).stat().st_size
    time.sleep(600 if number == 1 else 0)
    return number


def dies_once(item, shared=None):
    """Kills its worker the first time that ``item`` (folder, name) is run, and leaves a line for
    every run that ends."""
    folder, name = item
    first = Path(folder) / f"{name}.begun"
    if name == "victim" and not first.exists():
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    return name


def wait_for(item, shared=None):
    """Says in a folder who runs it, and ends when ``go`` is there."""
    folder, number = item
    (Path(folder) / f"{number}-{os.getpid()}").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.02)
    return number
