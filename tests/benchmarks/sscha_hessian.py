"""Free-energy Hessian of this package against python-sscha, in one run on one core: ``python
tests/benchmarks/sscha_hessian.py``.

Both get the same ensemble (forces of a random cubic model; the time does not depend on them), both
compute the symmetrised third-order tensor and the Hessian. Each side runs in a process of its own,
so that its peak memory is its own. python-sscha is linear in the number of configurations plus a
constant: by default it is timed at two small numbers and the line through them is used (the output
says so); ``--full`` runs it at the full number, which takes tens of minutes for the larger cells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms

from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.state import SschaState, expand, fold, normal_modes, sample, sum_rule
from magus_anharmonic.sscha.symmetry import Symmetry

N_CONFIGS = 1000


def im3m():
    """Im-3m H3S, 4 atoms."""
    cell = 1.5 * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    return Atoms(
        "SH3",
        positions=1.5 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        cell=cell,
        pbc=True,
    )


def p1(n_atoms):
    """A cell of ``n_atoms`` without symmetry, about 6 A^3 per atom."""
    rng = np.random.default_rng(n_atoms)
    sites = (np.array(list(np.ndindex(4, 2, 2)))[:: 16 // n_atoms] + 0.5) / [4, 2, 2]
    atoms = Atoms(
        numbers=rng.permutation([1, 16] * (n_atoms // 2)),
        scaled_positions=sites,
        cell=np.eye(3),
        pbc=True,
    )
    atoms.set_cell(np.diag([1.0, 1.07, 0.94]) * (6.0 * n_atoms) ** (1 / 3), scale_atoms=True)
    atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
    return atoms


CASES = {
    "64 atoms, P1 (8 x 2x2x2)": (p1(8), (2, 2, 2), (N_CONFIGS, N_CONFIGS)),
    "128 atoms, P1 (16 x 2x2x2)": (p1(16), (2, 2, 2), (20, 60)),
    "108 atoms, Im-3m H3S (4 x 3x3x3)": (im3m(), (3, 3, 3), (20, 60)),
}
"""Cell, supercell, and the numbers of configurations at which python-sscha is timed by default."""


def problem(name, n_configs, temperature=300.0):
    """A state with random force constants of its symmetry, and an ensemble with a random cubic
    force."""
    atoms, supercell_matrix, _ = CASES[name]
    symmetry = Symmetry(atoms, supercell_matrix)
    rng = np.random.default_rng(0)
    n_cells, n = int(np.prod(supercell_matrix)), len(atoms)
    full = expand(
        symmetry.force_constants(rng.normal(0, 0.3, (n_cells, n, n, 3, 3))), supercell_matrix
    )
    full += (3.0 - np.linalg.eigvalsh(full)[0]) * sum_rule(np.eye(len(full)))
    state = SschaState(
        atoms, supercell_matrix, symmetry.force_constants(fold(full, supercell_matrix)), temperature
    )
    assert np.all(normal_modes(state.full, state.supercell.get_masses()).hbar_omega > 0)
    u = sample(state, n_configs, rng)
    pulls = -(u.reshape(n_configs, -1) @ state.full).reshape(u.shape)
    extra = 3.0 * u * np.roll(u, 1, axis=1) + rng.normal(0, 0.01, u.shape)
    return (
        state,
        Ensemble(u, np.zeros(n_configs), pulls + extra, np.zeros((n_configs, 3, 3))),
        symmetry,
    )


def peak_memory():
    """Peak resident memory of this process since `reset_peak`, MB."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def reset_peak():
    """Forget the peak so far; resident memory now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def run_ours(name, n_configs, *, errors, include_v4=False):
    """CPU seconds and memory of our Hessian; ``errors`` adds error bars and the removal of the
    noise of the square."""
    from magus_anharmonic.sscha.hessian import free_energy_hessian

    state, ensemble, symmetry = problem(name, n_configs)
    _ = state.full, state.supercell
    before = reset_peak()
    begun = time.process_time()
    free_energy_hessian(
        state, ensemble, symmetry, unbiased=errors, errors=errors, include_v4=include_v4
    )
    return {
        "seconds": time.process_time() - begun,
        "memory": peak_memory() - before,
        "process": peak_memory(),
    }


def run_stock(name, n_configs, *, symmetries):
    """CPU seconds and memory of ``get_free_energy_hessian``; without its symmetrisation it is a
    lower bound."""
    from magus_anharmonic.sscha import python_sscha

    state, ensemble, _ = problem(name, n_configs)
    with python_sscha.quiet(Path(os.devnull)):
        loaded = python_sscha.to_ensemble(state, ensemble)
        before = reset_peak()
        begun = time.process_time()
        loaded.get_free_energy_hessian(include_v4=False, use_symmetries=symmetries)
        seconds = time.process_time() - begun
    return {"seconds": seconds, "memory": peak_memory() - before, "process": peak_memory()}


def apart(function, name, n_configs, **options):
    """Call one of the two functions above in a process of its own."""
    # the folder must not stay on the path: its sscha.py has the name of python-sscha's package
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import"
        f" sscha_hessian as b; sys.path.pop(0);found = b.{function}({name!r}, {n_configs},"
        f" **{options!r}); open(sys.argv[1], 'w').write(json.dumps(found))"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        subprocess.run(
            [sys.executable, "-c", code, str(path)], check=True, cwd=folder, env=environment
        )
        return json.loads(path.read_text())


@dataclass(frozen=True)
class Comparison:
    """CPU seconds and memory (MB) of python-sscha and of ours, ours with error bars too, and how
    the stock time was got."""

    name: str
    theirs: float
    ours: float
    their_memory: float
    memory: float
    with_errors: float
    memory_with_errors: float
    how: str

    @property
    def remark(self):
        """Memory, error bars and where the stock time comes from."""
        return (
            f"memory {self.their_memory:.0f} / {self.memory:.0f} MB ="
            f" {self.their_memory / self.memory:.1f}x; with error bars {self.with_errors:.2f} s,"
            f" {self.memory_with_errors:.0f} MB; {self.how}"
        )


def compare(name, *, full=False):
    """Time and memory of both sides for one of `CASES`."""
    ours = [apart("run_ours", name, N_CONFIGS, errors=False) for _ in range(3)]
    seconds = float(np.median([found["seconds"] for found in ours]))
    with_errors = apart("run_ours", name, N_CONFIGS, errors=True)
    small, large = (N_CONFIGS, N_CONFIGS) if full else CASES[name][2]
    symmetries = full or small == large
    first = apart("run_stock", name, large, symmetries=symmetries)
    stock, how = first["seconds"], f"python-sscha run at {large} configurations"
    if small != large:
        other = apart("run_stock", name, small, symmetries=symmetries)
        slope = (first["seconds"] - other["seconds"]) / (large - small)
        stock = first["seconds"] + slope * (N_CONFIGS - large)
        how = (
            f"python-sscha on the line through {small} ({other['seconds']:.1f} s) and {large}"
            f" ({first['seconds']:.1f} s) configurations"
        )
        how += "; its symmetrisation left out, so a lower bound"
    own = max(1.0, *(found["memory"] for found in ours))
    return Comparison(
        name,
        stock,
        seconds,
        first["memory"],
        own,
        with_errors["seconds"],
        with_errors["memory"],
        how,
    )


def fourth_order(name="64 atoms, P1 (8 x 2x2x2)"):
    """One line: the full Hessian where the fourth-order tensor alone would not fit into memory."""
    found = apart("run_ours", name, N_CONFIGS, errors=False, include_v4=True)
    n = 3 * len(CASES[name][0]) * int(np.prod(CASES[name][1]))
    stock = f"python-sscha: one of its arrays alone has {8e-9 * n**4:.1f} GB"
    return f"{name} with <d4V>: CPU {found['seconds']:.0f} s, {found['memory']:.0f} MB ({stock})"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="run python-sscha at the full number of configurations"
    )
    parser.add_argument(
        "--cases", type=int, nargs="+", default=list(range(len(CASES))), help="which rows"
    )
    parser.add_argument("--v4", action="store_true", help="also the full Hessian of the first row")
    options = parser.parse_args()
    for index in options.cases:
        found = compare(list(CASES)[index], full=options.full)
        ratio = found.theirs / found.ours
        print(
            f"{found.name}: CPU {found.theirs:.1f} s / {found.ours:.2f} s = {ratio:.0f}x;"
            f" {found.remark}",
            flush=True,
        )
    if options.v4:
        print(fourth_order(), flush=True)


if __name__ == "__main__":
    main()
