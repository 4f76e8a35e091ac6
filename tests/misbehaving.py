"""An ASE calculator that fails in the way its arguments ask for, by number of atoms."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from ase.calculators.calculator import Calculator, all_changes


class Misbehaving(Calculator):
    """Zero forces, energy = number of atoms; ``behaviour`` maps a number of atoms to a way to
    fail."""

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, behaviour=None, child_file=None, nap=0.0, launcher="child"):
        super().__init__()
        self.launcher = launcher
        self.behaviour = {int(key): value for key, value in (behaviour or {}).items()}
        self.child_file, self.nap = child_file, nap
        self.converged = True

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        print("a line that a DFT code prints on standard output", flush=True)
        os.write(1, b"{not json from the code}\n")
        time.sleep(self.nap)
        n = len(atoms)
        how = self.behaviour.get(n)
        self.results = {"energy": float(n), "forces": np.zeros((n, 3)), "stress": np.zeros(6)}
        if how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif how == "exit":
            os._exit(7)
        elif how == "hang":
            self._leave_a_program()
            time.sleep(600)
        elif how == "leave":
            self._leave_a_program()
            raise ValueError("mpirun noticed that rank 3 exited")
        elif how == "crash":
            self._leave_a_program()
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "nan":
            self.results["forces"] = np.full((n, 3), np.nan)
        elif how == "infinite":
            self.results["energy"] = np.inf
        elif how == "atoms":
            self.results["forces"] = np.zeros((n + 1, 3))
        elif how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        elif how == "disk full":
            raise OSError(errno.ENOSPC, "No space left on device", "pw.in")
        elif how == "raise":
            raise ValueError("the density is negative")
        elif how == "unconverged":
            self.converged = False
        elif how == "chatty":
            print("x" * 3_000_000 + "\nthe end of a long output", flush=True)
        elif how == "garbage":
            # as a library that writes to every file that it finds open
            for descriptor in range(3, 32):
                try:
                    if os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
                        os.write(descriptor, b"\xff\x00 stray bytes")
                except OSError:
                    continue
        elif how == "fork":
            os.fork()
        elif how == "stdin":
            self.results["energy"] = float(len(sys.stdin.readline()))
        elif how == "sort":
            atoms.set_positions(atoms.positions[::-1])
        elif how == "species":
            atoms.set_atomic_numbers(atoms.numbers[::-1])
        elif how == "move":
            atoms.positions[0] += 0.1
        elif how == "strain":
            atoms.set_cell(1.01 * atoms.cell, scale_atoms=True)
        elif how == "own copy":
            self.atoms = self.atoms[list(range(n))[::-1]]
        elif how == "here":
            Path("restart.dat").write_text(str(n))
            self.results["energy"] = float(Path(self.child_file).read_text())
        elif how == "escape":
            raise ValueError("\x1b[31mred\x1b]0;title\x07\x1b[2J")
        elif how == "pid":
            self.results["energy"] = float(os.getpid())

    def _leave_a_program(self):
        """One that runs on: a child; in a session of its own; below one that has ended; deaf to
        SIGTERM; without the environment."""
        if not self.child_file:
            return
        own = f"import os, signal, time; open({self.child_file!r}, 'w').write(str(os.getpid())); "
        if self.launcher == "deaf":
            own = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + own
        command = [sys.executable, "-c", own + "time.sleep(600)"]
        if "orphan" in self.launcher:
            command = [
                sys.executable,
                "-c",
                f"import subprocess; subprocess.Popen({command!r}, start_new_session=True)",
            ]
        subprocess.Popen(
            command,
            start_new_session=self.launcher != "child",
            env={} if "bare" in self.launcher else None,
        )
        while not (Path(self.child_file).is_file() and Path(self.child_file).read_text()):
            time.sleep(0.02)


class WithoutStress(Misbehaving):
    """Energy and forces only."""

    implemented_properties = ["energy", "forces"]


def made(behaviour=None):
    """A function that makes a calculator, as some packages offer it; with ``behaviour`` something
    else."""
    return Misbehaving() if behaviour is None else behaviour
