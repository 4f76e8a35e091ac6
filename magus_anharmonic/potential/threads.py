"""Batches side by side, one per thread, instead of several threads within one small matrix product.

The arrays of a batch are blocks that fit a core's cache; threads that share such a block wait for each other after every operation,
and where another program has one of the cores that wait takes most of the time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from threadpoolctl import threadpool_limits

SMALL = 128
"""Units; the products of a training step of a narrower model are too small to be shared by threads."""


@contextlib.contextmanager
def threads_for_training(module: torch.nn.Module) -> Iterator[None]:
    """One thread while a small model is trained on the CPU: more gain little, and cost most of the time where others work."""
    before = torch.get_num_threads()
    small = int(module.model_args["units"]) < SMALL and not next(module.parameters()).is_cuda  # type: ignore[arg-type, index]
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread_for_small_matrices() -> contextlib.AbstractContextManager[object]:
    """One thread for numpy's and scipy's linear algebra; torch keeps its own.

    The Hessians and cells of a relaxation have less than a hundred rows: more threads only wait for each other, and while they
    wait they take the cores from the evaluations (measured on two cores: 12.1 s with, 4.4 s without).
    """
    return threadpool_limits(1, user_api="blas")


def run_side_by_side(tasks: Iterator[Callable[[], None]], n_threads: int) -> None:
    """Run all tasks, each with a share of the ``n_threads`` that the caller may use; a task is drawn when a thread is free.

    One thread is the caller's own, with all its threads for torch. After an exception no further task begins, and it is raised here.
    Threads live as long as the call, so that a process may fork between calls.
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

    threads = [threading.Thread(target=work, name=f"evaluation {index}", daemon=True) for index in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # what a thread sets is also the value of threads that begin later
    torch.set_num_threads(before)
    if errors:
        raise errors[0]
