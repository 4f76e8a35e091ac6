"""The main blocks of M3GNet over all edges, compiled, for single precision on a CPU.

``edge_kernels.c`` is compiled at first use with the C compiler of the machine. The library goes to
the user's cache folder, under a name made of the source, the compiler and the processor, so that
machines that share a home do not share it. Without a compiler, or where the compiled functions do
not give torch's numbers (`magus_anharmonic.potential.layers`), everything works with torch alone,
only slower; the log says so once.
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magus_anharmonic.errors import one_line
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import replacing
from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.layers import EdgeNetwork, Layer, TorchLayers
from magus_anharmonic.processes import run_bounded

logger = logging.getLogger(__name__)

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.c")
    for name in ("edge_kernels", "edge_basis", "far_edges", "polynomial")
)
COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
)
_OPTIONAL = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())
_TIMEOUT = 60.0  # s
_AGREEMENT = 1e-5
PANEL = 16
"""Columns of a packed matrix that lie together; the units of a compiled model are a multiple."""


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """The ctypes form of a struct of the C file."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def pointers(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), ctypes.c_void_p)


_Network = structure("network", **pointers("bond bond_back second second_bias second_back beside"))
_Layer = structure("layer", **pointers("three three_back"), edge=_Network, atom=_Network)
_Graph = structure(
    "graph",
    **dict.fromkeys(("units", "n_edges", "near", "n_atoms"), ctypes.c_long),
    **pointers("centre neighbour basis threebody"),
)
_Pass = structure("pass", **pointers("gates tables by_atom edge kept by_basis by_threebody"))


def address(array: Tensor | None) -> int | None:
    if array is None:
        return None
    if not array.is_contiguous():
        raise ValueError("an array is not contiguous")
    return array.data_ptr()


def pointed(*arrays: Tensor | None) -> list[ctypes.c_void_p]:
    """Arguments of a compiled function; nothing becomes a null pointer."""
    return [ctypes.c_void_p(address(array)) for array in arrays]


def _arguments(*arrays: Tensor | None) -> list[Any]:
    """Of a compiled function: arrays, and how many threads it may use."""
    return [*pointed(*arrays), ctypes.c_long(torch.get_num_threads())]


def _packed(matrix: Tensor) -> Tensor:
    """(..., rows, columns) with the columns in panels."""
    *rest, rows, columns = matrix.shape
    panels = matrix.reshape(*rest, rows, columns // PANEL, PANEL)
    return panels.transpose(-3, -2).contiguous()


class _Packed:
    """Weights of a layer as the C file wants them; owns their memory."""

    def __init__(self, layer: Layer) -> None:
        self._arrays: list[Tensor] = []
        self.struct = _Layer(
            self._keep(_packed(layer.three.T)),
            self._keep(_packed(layer.three)),
            self._network(layer.edge),
            self._network(layer.atom),
        )

    def _keep(self, array: Tensor) -> int | None:
        self._arrays.append(array)
        return address(array)

    def _network(self, network: EdgeNetwork) -> Any:
        return _Network(
            self._keep(_packed(network.bond.T)),
            self._keep(_packed(network.bond)),
            self._keep(_packed(network.second.mT)),
            self._keep(network.second_bias),
            self._keep(_packed(network.second)),
            self._keep(network.beside),
        )


class NativeLayers(TorchLayers):
    """The compiled form of `TorchLayers`, with as many threads as torch uses."""

    def __init__(
        self, graph: Graph, radial: Tensor, threebody: Tensor, units: int, functions: ctypes.CDLL
    ) -> None:
        self._native, self._arrays = functions, (graph, radial, threebody)
        self._packed: dict[Layer, _Packed] = {}
        self._graph = _Graph(
            units, len(radial), graph.n_near, len(graph.numbers),
            *map(address, (graph.centre, graph.neighbour, radial, threebody)),
        )  # fmt: skip

    @staticmethod
    def n_kept(graph: Graph, units: int) -> int:
        return units * (10 * len(graph.centre) + 2 * graph.n_near)

    def _run(
        self,
        layer: Layer,
        *arrays: Tensor | None,
        atom: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        if layer not in self._packed:
            self._packed[layer] = _Packed(layer)
        failed = self._native.layer_pass(
            ctypes.byref(self._graph),
            ctypes.byref(self._packed[layer].struct),
            ctypes.byref(_Pass(*map(address, arrays))),
            *_arguments(atom, sums),
        )
        if failed:
            raise MemoryError("no memory for the sums over the edges of an atom")

    def encode(self, beside: Tensor, edge: Tensor) -> None:
        self._native.encode(ctypes.byref(self._graph), *_arguments(beside, edge))

    def encode_backward(self, beside: Tensor, by_edge: Tensor, by_radial: Tensor) -> None:
        arrays = _arguments(beside, by_edge, by_radial)
        self._native.encode_backward(ctypes.byref(self._graph), *arrays)

    def forward(
        self, layer: Layer, kept: Tensor, gates: Tensor, tables: Tensor, edge: Tensor, atom: Tensor
    ) -> None:
        self._run(layer, gates, tables, None, edge, kept, None, None, atom=atom)

    def backward(
        self,
        layer: Layer,
        kept: Tensor,
        gates: Tensor,
        by_atom: Tensor,
        by_edge: Tensor,
        by_radial: Tensor,
        by_threebody: Tensor,
        constant: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        n_atoms, units = by_atom.shape
        sums = None if constant else gates.new_zeros(n_atoms * (16 + 8 * units))
        self._run(layer, gates, None, by_atom, by_edge, kept, by_radial, by_threebody, sums=sums)
        if sums is None:
            return None
        by_gates, by_tables = sums.split([16 * n_atoms, 8 * units * n_atoms])
        return by_gates.view(-1, 16), by_tables.view(4, n_atoms, 2 * units)


def layers_for(graph: Graph, radial: Tensor, threebody: Tensor, units: int) -> TorchLayers:
    """The fastest form for tensors like ``radial``."""
    if radial.device.type == "cpu" and radial.dtype == torch.float32 and units % PANEL == 0:
        functions = _checked_functions()
        if functions is not None:
            return NativeLayers(graph, radial, threebody, units, functions)
    return TorchLayers(graph, radial, threebody, units)


@functools.cache
def _checked_functions() -> ctypes.CDLL | None:
    """See `agreeing`, once per process."""

    def difference(functions: ctypes.CDLL) -> float:
        return disagreement(functools.partial(NativeLayers, functions=functions))

    return agreeing("kernels", difference, _AGREEMENT)


def agreeing(
    what: str, disagreement: Callable[[ctypes.CDLL], float], agreement: float
) -> ctypes.CDLL | None:
    """The compiled functions; None where there are none, or ``what`` differs from torch's form by
    ``agreement`` or more."""
    functions = library()
    if functions is None:
        return None
    difference = disagreement(functions)
    if difference < agreement:
        return functions
    logger.warning(
        "compiled %s: different from torch by %.1e and not used (compiler of this machine?)",
        what,
        difference,
    )
    return None


def largest_difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """Between two lists of arrays, relative to the largest number of each of ``theirs``; NaN counts
    as infinite."""
    return max(
        float(torch.nan_to_num(one - other, torch.inf).abs().max() / other.abs().max())
        for one, other in zip(ours, theirs, strict=True)
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """What is compiled, once per process; None without a compiler. Who uses a function of it
    compares it with torch first."""
    try:
        return ctypes.CDLL(str(compiled(cache_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info(
            "the evaluation works with torch alone, at half the speed or less: %s",
            one_line(error, 200),
        )
        return None


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
        [
            *(one.read_text(encoding="utf-8") for one in SOURCES),
            compiler,
            platform.machine(),
            _processor(),
            *_FLAGS,
        ]
    )
    library = folder / f"edge_kernels-{digest(identity, length=16)}.so"
    if not library.is_file():
        _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "edge_kernels.so"
        for optional in _OPTIONAL:
            command = [compiler, *_FLAGS, *optional, *map(str, SOURCES), "-o", str(built), "-lm"]
            done = run_bounded(command, _TIMEOUT)
            if done.returncode == 0:
                break
        else:
            raise OSError(f"{compiler} cannot compile {SOURCES[0].name}: {done.stderr}")
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


def disagreement(
    form: Callable[[Graph, Tensor, Tensor, int], TorchLayers], seed: int = 0, n_edges: int = 103
) -> float:
    """Largest difference between the layers that ``form`` makes and torch's, relative to the
    largest number of an array, on random graphs; NaN counts as infinite."""
    return max(
        largest_difference(*(exercise(one, n_edges, units, seed) for one in (form, TorchLayers)))
        for units in (16, 64)
    )


def exercise(
    form: Callable[[Graph, Tensor, Tensor, int], TorchLayers], n_edges: int, units: int, seed: int
) -> list[Tensor]:
    """All that a pass forth and back writes, from the same random numbers; some sums far out in
    the tails."""
    generator, n_atoms, n_near = torch.Generator().manual_seed(seed), 4, n_edges // 2

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    def network() -> EdgeNetwork:
        scale = units**-0.5
        return EdgeNetwork(
            random(2 * units, 3 * units, scale=scale), random(2 * units),
            random(2, units, units, scale=scale), random(2, units), random(4, units, scale=0.5),
        )  # fmt: skip

    def no(kind: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=kind)

    layer = Layer(random(16, units), random(16), random(2 * units, 16), network(), network())
    centre = torch.arange(n_edges) * n_atoms // n_edges
    neighbour = torch.randint(0, n_atoms, (n_edges,), generator=generator)
    graph = Graph(
        centre, neighbour, random(n_edges, 3), n_near, no(torch.long), torch.ones(n_atoms),
        no(torch.long), no(torch.float32), (n_atoms,),
    )  # fmt: skip
    radial, threebody = random(n_edges, 4), random(n_near, 16)
    passes = form(graph, radial, threebody, units)
    atom, edge = random(n_atoms, units), random(n_edges, units)
    edge[0, ::2], edge[-1, ::2] = -60.0, 60.0
    gates, tables, result = layer.gates(atom), layer.tables(atom), atom.double()
    kept, beside = torch.empty(passes.n_kept(graph, units)), random(4, units)
    first = torch.empty(n_edges, units)
    passes.encode(beside, first)
    passes.forward(layer, kept, gates, tables, edge, result)
    by_atom, by_edge = random(n_atoms, units), random(n_edges, units)
    by_radial, by_threebody = random(n_edges, 4), random(n_near, 16)
    found = passes.backward(layer, kept, gates, by_atom, by_edge, by_radial, by_threebody)
    passes.encode_backward(beside, by_edge, by_radial)
    return [first, result, edge, by_edge, by_radial, by_threebody, *found]
