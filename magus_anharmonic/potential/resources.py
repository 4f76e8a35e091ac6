"""What a batch may cost: memory per edge, threads.

How much memory an evaluation takes, how much there is, and what to do when it was not enough.

Batches side by side, one per thread, instead of several threads within one small matrix product.

The arrays of a batch are blocks that fit a core's cache; threads that share such a block wait for
each other after every operation, and where another program has one of the cores that wait takes
most of the time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ase import Atoms
from threadpoolctl import threadpool_limits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.graph import build_graph

if TYPE_CHECKING:
    from magus_anharmonic.potential.m3gnet import FactorisedM3GNet


SHARE = 0.7
"""Of the free memory that one batch may take."""


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that an evaluation takes for each edge and for each atom."""

    per_edge: float
    per_atom: float

    def bytes(self, n_edges: int, n_atoms: int) -> float:
        """Of a batch."""
        return self.per_edge * n_edges + self.per_atom * n_atoms


def measure(
    model: FactorisedM3GNet,
    dtype: torch.dtype,
    device: str,
    probe: Callable[[Any], float] | None = None,
) -> MemoryModel:
    """The memory model of ``model``, from the peaks of three small evaluations.

    probe
        Bytes at the peak of the evaluation of a `Graph`; the default counts what torch allocates.
    """
    probe = probe or (lambda graph: peak_bytes(model, graph))

    def graph(structures: list[Atoms]) -> Any:
        return build_graph(
            structures, model.cutoff, dtype, device, threebody_cutoff=model.threebody_cutoff
        )

    lone = Atoms("H", cell=[4 * model.cutoff] * 3, pbc=True)
    # Twice the density of H3S at 150 GPa; most edges within the three-body cutoff, so that the
    # estimate is a high one.
    crowded = Atoms("H", cell=[model.threebody_cutoff / 2.9] * 3, pbc=True)
    few, many = probe(graph([lone] * 100)), probe(graph([lone] * 300))
    per_atom = max((many - few) / 200, 1.0)
    small, large = graph([crowded] * 10), graph([crowded] * 30)
    extra = probe(large) - probe(small) - 20 * per_atom
    return MemoryModel(max(extra / (len(large.centre) - len(small.centre)), 1.0), per_atom)


def peak_bytes(model: FactorisedM3GNet, graph: Any) -> float:
    """Largest sum of the tensors that live at the same time during an evaluation, on any device."""
    with model.fresh_workspace(), _Peak() as counter:
        model(graph)
    return float(counter.peak)


class _Peak(TorchDispatchMode):
    """Follows the storages that torch's operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._meet(value.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def chosen_device(asked: str | None) -> str:
    """``asked``, or cuda where there is one; raises ``InputError`` for a device that is not
    there."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"device {asked}: this machine has no CUDA device, or torch was built without CUDA"
        )
    return asked


def available_bytes(device: str) -> float:
    """Free memory of the device; infinite where the system does not say."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return float(
            free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )
    return min(_available_ram(), _control_group_rest())


def _available_ram() -> float:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return float("inf")


def _control_group_rest() -> float:
    """What a job of a queue or a container may still take."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            folder = Path("/sys/fs/cgroup")
            return float((folder / limit).read_text()) - float((folder / used).read_text())
        except (OSError, ValueError):
            continue  # another version of control groups, or "max"
    return float("inf")


SMALL = 128
"""Units; the products of a training step of a narrower model are too small to be shared by
threads."""


@contextlib.contextmanager
def threads_for_training(module: torch.nn.Module) -> Iterator[None]:
    """One thread while a small model is trained on the CPU: more gain little, and cost most of the
    time where others work."""
    before = torch.get_num_threads()
    small = int(module.model_args["units"]) < SMALL and not next(module.parameters()).is_cuda  # type: ignore[arg-type, index]
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread_for_small_matrices() -> contextlib.AbstractContextManager[object]:
    """One thread for numpy's and scipy's linear algebra; torch keeps its own.

    The Hessians and cells of a relaxation have less than a hundred rows: more threads only wait for
    each other, and while they wait they take the cores from the evaluations (measured on two cores:
    12.1 s with, 4.4 s without).
    """
    return threadpool_limits(1, user_api="blas")


def run_side_by_side(tasks: Iterator[Callable[[], None]], n_threads: int) -> None:
    """Run all tasks, each with a share of the ``n_threads`` that the caller may use; a task is
    drawn when a thread is free.

    One thread is the caller's own, with all its threads for torch. After an exception no further
    task begins, and it is raised here. Threads live as long as the call, so that a process may fork
    between calls.
    """
    if n_threads <= 1:
        for task in tasks:
            task()
        return
    lock, errors = threading.Lock(), []
    before = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(1)
        while True:
            try:
                with lock:
                    task = None if errors else next(tasks, None)
                if task is None:
                    return
                task()
            except BaseException as error:
                with lock:
                    errors.append(error)
                return

    threads = [
        threading.Thread(target=work, name=f"evaluation {index}", daemon=True)
        for index in range(n_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # what a thread sets is also the value of threads that begin later
    torch.set_num_threads(before)
    if errors:
        raise errors[0]
