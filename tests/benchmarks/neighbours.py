"""Neighbour lists: vesin against matscipy and vesin's torch form, where they are installed:
``python tests/benchmarks/neighbours.py``.

Milliseconds of the process per structure for all pairs within 5 Angstrom of H3S at 150 GPa; and the
shared list of this package.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import numpy as np
import torch
from ase import Atoms
from evaluation import supercells
from vesin import NeighborList

from magus_anharmonic.potential.graph import find_neighbours, find_topology

CUTOFF = 5.0


def vesin(atoms: Atoms) -> int:
    finder = NeighborList(cutoff=CUTOFF, full_list=True, sorted=True, n_threads=1)
    return len(finder.compute(atoms.positions, atoms.cell.array, atoms.pbc, "ijDd")[0])


def matscipy(atoms: Atoms) -> int:
    from matscipy.neighbours import neighbour_list

    return len(neighbour_list("ijDd", atoms, CUTOFF)[0])


def vesin_torch(atoms: Atoms) -> int:
    from vesin_torch import NeighborList as TorchNeighborList

    finder = TorchNeighborList(cutoff=CUTOFF, full_list=True)
    box = torch.from_numpy(atoms.cell.array.copy())
    return len(
        finder.compute(
            points=torch.from_numpy(atoms.positions), box=box, periodic=True, quantities="ijDd"
        )[0]
    )


def milliseconds(function: Callable[[], object], supercell_matrix: int = 20) -> float:
    """The median."""
    function()
    times = []
    for _ in range(supercell_matrix):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return 1e3 * float(np.median(times))


def main() -> None:
    torch.set_num_threads(1)
    sizes = {4 * repeat**3: supercells(8, repeat=repeat) for repeat in (1, 2, 4)}
    print("atoms".ljust(28), *(f"{size:8d}" for size in sizes))
    for function, module in (
        (vesin, "vesin"),
        (matscipy, "matscipy"),
        (vesin_torch, "vesin_torch"),
    ):
        if importlib.util.find_spec(module) is None:
            print(module.ljust(28), "not installed")
            continue
        counts = [function(structures[0]) for structures in sizes.values()]
        assert counts == [
            len(find_neighbours(structures[0], CUTOFF).length) for structures in sizes.values()
        ]
        print(
            module.ljust(28),
            *(f"{milliseconds(lambda f=function, s=s: f(s[0])):8.2f}" for s in sizes.values()),
        )
    shared = []
    for structures in sizes.values():
        topology = find_topology(structures, CUTOFF)
        assert topology is not None
        call = milliseconds(lambda t=topology, s=structures: t.graph(s, 4.0, torch.float32, "cpu"))
        shared.append(call / len(structures))
    print("shared list, whole graph".ljust(28), *(f"{value:8.2f}" for value in shared))


if __name__ == "__main__":
    main()
