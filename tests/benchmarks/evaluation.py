"""Evaluation against stock MatterSim on the same structures: the rows of
``tests/benchmarks/potential.py`` that are about it.

H3S supercells of 32 atoms at about 150 GPa, displaced by 0.1 Angstrom per component; random weights
(the time does not depend on them), of 162k the shipped model. Stock and ours take turns, each in all
its settings, and the medians of the best are compared. With one thread the time is that of the
processor, so that other work on the machine counts less; with several both are given, and the ratio
is that of the wall clock. On a GPU it is the wall clock after synchronising.
"""

import functools
import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from loguru import logger
from mattersim.datasets.utils.build import build_dataloader
from mattersim.forcefield import MatterSimCalculator
from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
from mattersim.forcefield.potential import Potential as StockPotential

from magus_anharmonic.potential import checkpoint
from magus_anharmonic.potential.evaluate import Potential

SIZES = {"890k": (3, 128), "232k": (3, 64), "162k": (2, 64), "44k": (2, 32)}
"""Blocks and units of the models."""
SHIPPED = Path(checkpoint.__file__).parents[1] / "data" / "h3s-gpaw-small.pth"

RIGHT_BATCHES = (
    {"batch_converter": True}
    if "batch_converter" in inspect.signature(build_dataloader).parameters
    else {}
)
"""What makes stock's batches of several structures right: by default those of mattersim 1.2.5 give
triplets of later structures bonds of the first."""

Evaluate = Callable[[Sequence[Atoms]], object]
Measured = tuple[float | None, str]
"""Ratio of stock to ours (None: not measured), and the numbers behind it."""


def supercells(count, seed=7, repeat=2):
    """Displaced supercells of Im-3m H3S at about 150 GPa; 4 repeat^3 atoms each."""
    rng = np.random.default_rng(seed)
    half = 1.5
    cell = half * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    unit = Atoms("SH3", positions=np.vstack([np.zeros(3), half * np.eye(3)]), cell=cell, pbc=True)
    result = []
    for _ in range(count):
        atoms = unit.repeat((repeat, repeat, repeat))
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        result.append(atoms)
    return result


@functools.cache
def path_of(size):
    """The shipped checkpoint, or one with random weights."""
    if size == "162k":
        return SHIPPED
    blocks, units = SIZES[size]
    torch.manual_seed(0)
    path = Path(tempfile.mkdtemp()) / "model.pth"
    checkpoint.save(M3Gnet(num_blocks=blocks, units=units, device="cpu"), path)
    return path


@functools.cache
def model(size, device="cpu"):
    """Ours and stock's potential with the same weights."""
    logger.remove()
    path = path_of(size)
    ours = Potential(checkpoint.read(path, device)[0], device=device)
    return ours, StockPotential.from_checkpoint(str(path), device=device, load_training_state=False)


@functools.cache
def stock_calculators(path):
    """Settings of stock's calculator: name -> calculator; those of 1.2.5 where that is installed."""
    settings = {"default": {}}
    if "compile" in inspect.signature(MatterSimCalculator.__init__).parameters:
        settings |= {"direct_graph": {"direct_graph": True}, "compiled": {"compile": True}}
    return {
        name: MatterSimCalculator(load_path=str(path), device="cpu", **options)
        for name, options in settings.items()
    }


def one_by_one(calculator):
    """The calculator on each structure."""

    def call(structures):
        for atoms in structures:
            calculator.calculate(atoms)

    return call


def stock_call(stock, batch=None):
    """Stock's batched evaluation, its graphs included; all structures in one batch unless ``batch``
    is given."""

    def call(structures):
        loader = build_dataloader(
            [atoms.copy() for atoms in structures],
            batch_size=batch or len(structures),
            only_inference=True,
            **RIGHT_BATCHES,
        )
        return stock.predict_properties(loader, include_forces=True, include_stresses=True)

    return call


def seconds(function, structures):
    """Per structure: of the processor and, on a GPU or with several threads, by the clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    function(structures)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    by_clock = torch.cuda.is_available() or torch.get_num_threads() > 1
    return (wall if by_clock else cpu) / len(structures), cpu / len(structures)


def interleaved(calls, rounds):
    """Medians of seconds per structure, and of the processor's; the calls take turns."""
    for function, structures in calls.values():
        # all shapes: what is compiled is compiled again when the second one differs from the first
        function(structures)
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (function, structures) in calls.items():
            times[name].append(seconds(function, structures))
    found = {name: np.median(values, axis=0) for name, values in times.items()}
    return {name: float(time) for name, (time, _) in found.items()}, {
        name: float(cpu) for name, (_, cpu) in found.items()
    }


def best_against_best(size, rounds):
    """Each at its best setting and batch size."""
    ours, stock = model(size)
    structures = supercells(16)
    calls = {
        f"stock batch {batch}": (stock_call(stock, batch), structures[:batch]) for batch in (1, 4)
    }
    for name, calculator in stock_calculators(path_of(size)).items():
        if name != "default":
            calls[f"stock {name}"] = (one_by_one(calculator), structures[:4])
    for batch in (1, 4, 16):
        calls[f"ours {batch}"] = (ours.evaluate, structures[:batch])
    found, processor = interleaved(calls, rounds)
    best = {
        side: min(value for name, value in found.items() if name.startswith(side))
        for side in ("stock", "ours")
    }
    text = "ms per structure: " + _milliseconds(found)
    if torch.get_num_threads() > 1:
        text += "; of the processor: " + _milliseconds(processor)
    return best["stock"] / best["ours"], text


def batch_sixteen(rounds):
    """Both with 16 structures in one batch."""
    ours, stock = model("890k")
    structures = supercells(16)
    found, _ = interleaved(
        {"stock": (stock_call(stock), structures), "ours": (ours.evaluate, structures)}, rounds
    )
    return found["stock"] / found["ours"], "ms per structure: " + _milliseconds(found)


def many_supercells(rounds):
    """64 configurations in one call of ours; stock at its best batch size, on every fourth of
    them."""
    ours, stock = model("44k")
    structures = supercells(64)
    calls = {"stock": (stock_call(stock, 1), structures[::4]), "ours": (ours.evaluate, structures)}
    found, _ = interleaved(calls, rounds)
    return found["stock"] / found["ours"], "ms per structure: " + _milliseconds(found)


def _milliseconds(found):
    return ", ".join(f"{name} {1e3 * value:.1f}" for name, value in found.items())


def memory(rounds):
    """Growth of the peak memory of a process of its own from a loaded model to 16 structures of 32
    atoms in one batch."""
    grown = {}
    for side in ("stock", "ours"):
        run = subprocess.run(
            [sys.executable, __file__, side], capture_output=True, text=True, check=True
        )
        grown[side] = json.loads(run.stdout.splitlines()[-1])
    return (
        grown["stock"] / grown["ours"],
        f"MB: stock {grown['stock']:.0f}, ours {grown['ours']:.0f}",
    )


def _grow(side):
    """Print the growth of the peak resident memory in MB; in a process of its own."""
    torch.set_num_threads(1)
    ours, stock = model("890k")
    call = ours.evaluate if side == "ours" else stock_call(stock)
    tiny = supercells(1, repeat=1)
    call(tiny)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # forget the peak so far, which is that of importing
    call(supercells(16))
    print(json.dumps(_resident("VmHWM") - before))


def _resident(key):
    """MB, from Linux."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return float(line.split()[1]) / 1024


def gemm_rate(rows, columns, inner, device="cpu", duration=0.3):
    """flop/s of single-precision products of these sizes."""
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    out = torch.empty(rows, columns, device=device)
    clock = (
        time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    )
    torch.mm(a, b, out=out)
    count, begun = 0, clock()
    while clock() - begun < duration:
        torch.mm(a, b, out=out)
        count += 1
        if device != "cpu":
            torch.cuda.synchronize()
    return 2 * rows * columns * inner * count / (clock() - begun)


def edge_flops(size):
    """Of the edge networks for one edge, forward and gradient: per block two networks of (u -> 2 u)
    and twice (u -> u)."""
    blocks, units = SIZES[size]
    return 2 * blocks * 2 * (2 * units * 2 * units + 2 * 2 * units * units)


def gpu(rounds):
    """256 structures of 32 atoms, 890k."""
    if not torch.cuda.is_available():
        return None, "not measured: no CUDA device"
    ours, stock = model("890k", "cuda")
    structures = supercells(256)
    wide = [atoms.repeat((2, 1, 1)) for atoms in structures]
    calls = {
        "stock": (stock_call(stock, 16), structures[:64]),
        "ours": (ours.evaluate, structures),
        "ours, 64 atoms": (ours.evaluate, wide),
    }
    found, _ = interleaved(calls, rounds)
    n_edges = np.mean(
        [
            len(ours._join([atoms], [0], {0: neighbours(atoms, ours.cutoff)}).centre)
            for atoms in structures[:4]
        ]
    )
    share = n_edges * edge_flops("890k") / found["ours"] / gemm_rate(200_000, 256, 128, "cuda")
    text = (
        f"ms per structure: {_milliseconds(found)}; {32 / found['ours']:.0f} atoms/s on"
        f" {torch.cuda.get_device_name()}, {100 * share:.0f} %"
    )
    return (
        found["stock"] / found["ours"],
        (
            f"{text} of the card's rate for such products; at most 1 ms per 64 atoms is the aim on"
            " an H200"
        ),
    )


def neighbours(atoms, cutoff):
    """Of one structure."""
    from magus_anharmonic.potential.graph import find_neighbours

    return find_neighbours(atoms, cutoff)


def limit(rounds, sizes=tuple(SIZES)):
    """How far the evaluation is from the matrix products that it computes, in the same run: 1 would
    be the limit, 2 is the aim."""
    parts, worst = [], 0.0
    structures = supercells(4)
    for size in sizes:
        units = SIZES[size][1]
        ours, _ = model(size)
        ours.evaluate(structures)
        found = {k: neighbours(atoms, 5.0) for k, atoms in enumerate(structures)}
        graph = ours._join(structures, list(found), found)
        n_edges, n_far = len(graph.centre) / 4, (len(graph.centre) - graph.n_near) / 4
        # far edges are interpolated in the first of the blocks
        products = (n_edges - n_far / SIZES[size][0]) * edge_flops(size)
        distances = []
        for _ in range(max(rounds, 3)):
            # before and after, because the machine's speed changes
            rates = [gemm_rate(1024, 2 * units, units, duration=0.1)]
            spent = seconds(ours.evaluate, structures)[0]
            rates.append(gemm_rate(1024, 2 * units, units, duration=0.1))
            distances.append(spent * np.mean(rates) / products)
        distance = float(np.median(distances))
        worst = max(worst, distance)
        all_products = distance * products / (n_edges * edge_flops(size))
        milliseconds = 1e3 * products / np.mean(rates)
        parts.append(
            f"{size} {distance:.2f} ({milliseconds:.1f} ms of products at"
            f" {np.mean(rates) / 1e9:.0f} GFLOP/s; {all_products:.2f} of those without interpolation)"
        )
    return 2.0 / worst, "time by that of the products: " + ", ".join(parts)


ROWS = {
    "890k": (3.5, functools.partial(best_against_best, "890k")),
    "232k": (6.0, functools.partial(best_against_best, "232k")),
    "162k": (6.0, functools.partial(best_against_best, "162k")),
    "162k-products": (1.0, functools.partial(limit, sizes=("162k",))),
    "44k": (10.0, functools.partial(best_against_best, "44k")),
    "890k-batch16": (7.0, batch_sixteen),
    "memory": (8.0, memory),
    "supercells": (12.0, many_supercells),
    "gpu": (10.0, gpu),
}
"""Name -> (least ratio, measurement)."""


if __name__ == "__main__":
    _grow(sys.argv[1])
