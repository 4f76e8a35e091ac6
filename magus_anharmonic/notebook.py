"""How results show themselves, and what a long call says in a notebook."""

from __future__ import annotations

import functools
import html
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Described:
    """A result that shows itself as one line, and as a small table in a notebook."""

    def described(self) -> dict[str, str]:
        """What is shown: names and values with their units, the most important first."""
        raise NotImplementedError

    def __repr__(self) -> str:
        values = ", ".join(f"{name} = {value}" for name, value in self.described().items())
        return f"{type(self).__name__}({values})"

    def _repr_html_(self) -> str:
        return html_table(("", type(self).__name__), list(self.described().items()))


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for `_repr_html_`, everything escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def says_in_notebooks(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose log lines appear below the cell of a notebook while it runs.

    Elsewhere, and once the level of the logger ``magus_anharmonic`` is set, logging stays as it is.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _log_below_the_cell():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def _log_below_the_cell() -> Iterator[None]:
    log = logging.getLogger("magus_anharmonic")
    if not _in_notebook() or log.level != logging.NOTSET or log.isEnabledFor(logging.INFO):
        yield
        return
    handler = None if log.hasHandlers() else logging.StreamHandler(sys.stdout)
    if handler is not None:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(logging.NOTSET)
        if handler is not None:
            log.removeHandler(handler)


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None
