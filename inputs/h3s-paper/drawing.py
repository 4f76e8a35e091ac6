"""What every figure of the paper is made of; loaded by ``magus_anharmonic.paper.script``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magus_anharmonic.io import pictures as style
from magus_anharmonic.paper import tables

MANY = 500
"""Points; more are pixels in the SVG, so that it stays small."""


class Missing(Exception):
    """Why a figure cannot be made."""


@dataclass(frozen=True)
class Drawing:
    """A figure to be written: caption, alternative text, points and what follows from them (rows of
    one dataclass each), panels (columns, rows), and who draws into these."""

    name: str
    title: str
    alt: str
    rows: Sequence[Any]
    draw: Callable[[Sequence[Any]], None]
    summary: Sequence[Any] = ()
    panels: tuple[int, int] = (1, 1)
    headline: str | None = None
    """Above the panels; None: the caption."""

    def save(self, folder: Path) -> tuple[Path, Path]:
        """The picture as SVG and PNG."""
        title = self.title if self.headline is None else self.headline
        with style.figure(*self.panels, title=title) as (made, axes):
            self.draw(axes)
            svg, png = style.save(made, folder, self.name)
        return svg, png


def rows_of_step(table: type, folder: Path, step: str) -> list[Any]:
    """Rows of a table; `Missing` says which step makes it."""
    path = folder / table.FILE  # type: ignore[attr-defined]
    if not path.is_file():
        raise Missing(f"{path.name} is not there: {step} is not done")
    rows = tables.read(table, path)
    if not rows:
        raise Missing(f"{path.name} is empty: {step} left nothing")
    return rows


def diagonal(axes: Any, rows: Sequence[Any], index: int, label: str, size: float) -> None:
    """Points of ``predicted`` against ``reference`` about the diagonal."""
    axes.axline((0, 0), slope=1, color=style.GREY, lw=1)
    x, y = [row.reference for row in rows], [row.predicted for row in rows]
    marker, many = style.marker(index), len(rows) > MANY
    look = {"color": style.color(index), "ms": size, "alpha": 0.6, "mew": 0}
    axes.plot(x, y, marker, label=label, rasterized=many, **look)


def later(function: Callable[..., None], *arguments: Any) -> Callable[[Sequence[Any]], None]:
    """``function(axes, *arguments)`` once the panels are known."""
    return lambda axes: function(axes, *arguments)
