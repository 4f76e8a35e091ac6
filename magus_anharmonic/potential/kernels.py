"""Elementwise kernels of the edges, compiled, with torch as the fallback.

The elementwise parts of M3GNet's gated edge networks between two matrix products, for a block of
edges.

`Kernels` computes them with torch, for every device and precision;
`magus_anharmonic.potential.kernels` with one compiled loop each (``edge_kernels.c``), for single
precision on a CPU. Symbols: a gated network of u units has a first layer, whose sums ``before`` (B,
2 u) hold both branches side by side, and a second, whose sums ``y`` (B, 2 u) are again (inner |
gate); its output is silu(inner) * sigmoid(gate) * weight, with weight = e0 @ beside, or the silu of
that for the network of the atoms. All arrays are contiguous; what ends in ``_`` in a signature's
description is changed in place.

``edge_kernels.c``, compiled at first use with the C compiler of the machine, as a replacement for
torch's elementwise operations.

The library goes to the user's cache folder, under a name made of the source, the compiler and the
processor, so that machines that share a home do not share it. Without a compiler, or where the
compiled functions do not give torch's numbers, everything works with torch alone, only slower; the
log says so once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

from magus_anharmonic.errors import one_line
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import replacing
from magus_anharmonic.processes import run_bounded

_silu = torch.ops.aten.silu
_silu_backward = torch.ops.aten.silu_backward
_sigmoid_backward = torch.ops.aten.sigmoid_backward


class Kernels:
    """The torch form."""

    def first_forward(
        self,
        centre: Tensor,
        neighbour: Tensor,
        own: Tensor,
        other: Tensor,
        before: Tensor,
        hidden: Tensor,
    ) -> None:
        """before_ += own[centre] + other[neighbour]; hidden_ = silu(before)."""
        before += own.index_select(0, centre)
        before += other.index_select(0, neighbour)
        _silu.out(before, out=hidden)

    def first_backward(
        self,
        centre: Tensor,
        neighbour: Tensor,
        before: Tensor,
        by_hidden: Tensor,
        by_own: Tensor,
        by_other: Tensor,
    ) -> None:
        """by_hidden_ (gradient by silu(before)) becomes that by ``before``, and is added to
        by_own_[centre] and by_other_[neighbour]."""
        _silu_backward.grad_input(by_hidden, before, grad_input=by_hidden)
        add_rows(by_own, centre, by_hidden)
        add_rows(by_other, neighbour, by_hidden)

    def edge_forward(self, basis: Tensor, beside: Tensor, y: Tensor, edge: Tensor) -> None:
        """edge_ (B, u) += the network's output; basis (B, 4), beside (4, u)."""
        edge.addcmul_(basis @ beside, _gated(y))

    def atom_forward(
        self, basis: Tensor, beside: Tensor, y: Tensor, centre: Tensor, atom: Tensor
    ) -> None:
        """atom_[centre] += the network's output; atom (N, u) is float64."""
        add_rows(atom, centre, silu(basis @ beside, inplace=True).mul_(_gated(y)).to(atom.dtype))

    def edge_backward(
        self,
        basis: Tensor,
        beside: Tensor,
        y: Tensor,
        gradient: Tensor,
        index: None,
        by_y: Tensor,
        by_basis: Tensor,
    ) -> None:
        """by_y_ (B, 2 u) from the gradient by the output (B, u); by_basis_ (B, 4) grows."""
        by_weight = _gated_backward(y, basis @ beside, gradient, by_y)
        by_basis.addmm_(by_weight, beside.T)

    def atom_backward(
        self,
        basis: Tensor,
        beside: Tensor,
        y: Tensor,
        by_atom: Tensor,
        centre: Tensor,
        by_y: Tensor,
        by_basis: Tensor,
    ) -> None:
        """As `edge_backward`, from the gradient by the atom features (N, u)."""
        raw = basis @ beside
        by_weight = _gated_backward(y, silu(raw), by_atom.index_select(0, centre), by_y)
        by_basis.addmm_(_silu_backward(by_weight, raw), beside.T)

    def three_forward(self, y: Tensor, edge: Tensor) -> None:
        """edge_ (B, u) += silu(inner) * sigmoid(gate)."""
        edge += _gated(y)

    def three_backward(self, y: Tensor, gradient: Tensor, by_y: Tensor) -> None:
        """by_y_ (B, 2 u) from the gradient by the output (B, u)."""
        _gated_backward(y, None, gradient, by_y)


def _gated(y: Tensor) -> Tensor:
    inner, gate = y.chunk(2, 1)
    return silu(inner).mul_(gate.sigmoid())


def _gated_backward(y: Tensor, weight: Tensor | None, gradient: Tensor, by_y: Tensor) -> Tensor:
    """Gradient by the weight (B, u); by_y is filled."""
    inner, gate = y.chunk(2, 1)
    by_inner, by_gate = by_y.chunk(2, 1)
    sigma = gate.sigmoid()
    by_weight = gradient * silu(inner)
    weighted = gradient if weight is None else gradient * weight
    by_inner.copy_(_silu_backward(weighted * sigma, inner))
    by_gate.copy_(_sigmoid_backward(by_weight if weight is None else by_weight * weight, sigma))
    return by_weight.mul_(sigma)


def add_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """``target[index] += rows``; with an expanded index scatter_add is faster than index_add on a
    CPU."""
    target.scatter_add_(0, index[:, None].expand_as(rows), rows)


logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("edge_kernels.c")
COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    "-O3",
    "-std=c11",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
)
_OPTIONAL = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())
_TIMEOUT = 60.0  # s
_AGREEMENT = 1e-5


_SIZED_BY = {
    "first_forward": (4, 1),
    "first_backward": (2, 1),
    **dict.fromkeys(("edge_forward", "atom_forward", "edge_backward", "atom_backward"), (2, 2)),
    **dict.fromkeys(("three_forward", "three_backward"), (0, 2)),
}
"""Of the compiled functions: the argument that has their rows, and into how many widths its columns
are divided."""


class NativeKernels(Kernels):
    """The compiled form; float32 on a CPU, with as many threads as torch uses."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in _SIZED_BY:
            setattr(self, name, functools.partial(self._call, name))

    def _call(self, name: str, *arrays: Tensor | None) -> None:
        if not all(array is None or array.is_contiguous() for array in arrays):
            raise ValueError(f"{name}: an array is not contiguous")
        place, parts = _SIZED_BY[name]
        rows, columns = arrays[place].shape  # type: ignore[union-attr]
        getattr(self._library, name)(
            ctypes.c_long(rows),
            ctypes.c_long(columns // parts),
            *(None if one is None else ctypes.c_void_p(one.data_ptr()) for one in arrays),
            ctypes.c_long(torch.get_num_threads()),
        )


def kernels_for(example: Tensor) -> Kernels:
    """The fastest kernels for tensors like ``example``."""
    if example.device.type == "cpu" and example.dtype == torch.float32:
        return _native() or Kernels()
    return Kernels()


@functools.cache
def _native() -> NativeKernels | None:
    """The compiled kernels, once per process; None where there are none."""
    try:
        kernels = NativeKernels(ctypes.CDLL(str(compiled(cache_folder()))))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info(
            "the evaluation works with torch alone, at half the speed or less: %s",
            one_line(error, 200),
        )
        return None
    difference = disagreement(kernels)
    if not difference < _AGREEMENT:
        logger.warning(
            "compiled kernels differ from torch by %.1e and are not used (compiler of this"
            " machine?)",
            difference,
        )
        return None
    return kernels


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/magus-anharmonic`` or ``~/.cache/magus-anharmonic``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magus-anharmonic"


def compiled(folder: Path) -> Path:
    """The shared library in ``folder``, compiled when it is not there; OSError or SubprocessError
    when that fails."""
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise OSError(f"no C compiler ({', '.join(COMPILERS)}) in PATH")
    identity = "\n".join(
        [SOURCE.read_text(encoding="utf-8"), compiler, platform.machine(), _processor(), *_FLAGS]
    )
    library = folder / f"edge_kernels-{digest(identity, length=16)}.so"
    if not library.is_file():
        _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "edge_kernels.so"
        for optional in _OPTIONAL:
            command = [compiler, *_FLAGS, *optional, str(SOURCE), "-o", str(built), "-lm"]
            done = run_bounded(command, _TIMEOUT)
            if done.returncode == 0:
                break
        else:
            raise OSError(f"{compiler} cannot compile {SOURCE.name}: {done.stderr}")
        library.parent.mkdir(parents=True, exist_ok=True)
        with replacing(library) as temporary:
            shutil.copyfile(built, temporary)


def _processor() -> str:
    """Model and instruction sets of the processor, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


def disagreement(kernels: Kernels, seed: int = 0) -> float:
    """Largest difference between ``kernels`` and the torch form on random blocks; NaN counts as
    infinite."""
    worst = 0.0
    for rows, units in ((5, 3), (40, 32)):
        results = [_exercise(form, rows, units, seed) for form in (kernels, Kernels())]
        for ours, theirs in zip(*results, strict=True):
            worst = max(worst, torch.nan_to_num(ours - theirs, torch.inf).abs().max().item())
    return worst


def _exercise(kernels: Kernels, rows: int, units: int, seed: int) -> list[Tensor]:
    """All that the kernels write, from the same random numbers; some of them far out in the
    tails."""
    generator, n_atoms = torch.Generator().manual_seed(seed), 4

    def random(rows: int, columns: int = 2 * units) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    centre = torch.arange(rows) * n_atoms // rows
    neighbour = torch.randint(0, n_atoms, (rows,), generator=generator)
    before, hidden, y, by_hidden, *by_y = (random(rows) for _ in range(7))
    y[0, ::2], before[0, ::2], before[-1, 1::2] = -60.0, -100.0, 100.0
    own, other, by_own, by_other = (random(n_atoms) for _ in range(4))
    weights = random(rows, 4), 0.5 * random(4, units)
    edge, three, gradient = (random(rows, units) for _ in range(3))
    atom, by_atom = random(n_atoms, units).double(), random(n_atoms, units)
    by_basis = [random(rows, 4) for _ in range(2)]
    kernels.first_forward(centre, neighbour, own, other, before, hidden)
    kernels.edge_forward(*weights, y, edge)
    kernels.atom_forward(*weights, y, centre, atom)
    kernels.three_forward(y, three)
    kernels.edge_backward(*weights, y, gradient, None, by_y[0], by_basis[0])
    kernels.atom_backward(*weights, y, by_atom, centre, by_y[1], by_basis[1])
    kernels.three_backward(y, gradient, by_y[2])
    kernels.first_backward(centre, neighbour, before, by_hidden, by_own, by_other)
    return [before, hidden, edge, atom, three, *by_y, *by_basis, by_hidden, by_own, by_other]
