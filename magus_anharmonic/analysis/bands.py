"""Fig. 4b: dispersions from the free-energy Hessian (and what is to be compared with them)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from magus_anharmonic.analysis import style
from magus_anharmonic.analysis.tables import Band


def ticks(rows: Sequence[Band]) -> list[tuple[float, str]]:
    """(distance, label) of the special points, in order."""
    found = {round(row.distance, 9): row.label for row in rows if row.label}
    return sorted(found.items())


def lowest(rows: Sequence[Band]) -> dict[str, float]:
    """Method -> lowest frequency of its dispersion, cm^-1 (imaginary: negative)."""
    return {method: min(row.frequency_cm1 for row in rows if row.method == method) for method in dict.fromkeys(row.method for row in rows)}


def draw_bands(rows: Sequence[Band], folder: Path, title: str, name: str) -> list[Path]:
    """Lines for the branches of each method, error bars where a point has one; imaginary frequencies below zero."""
    with style.figure(title=title) as (made, (axes,)):
        axes.axhline(0.0, color=style.GREY, lw=1)
        for index, method in enumerate(dict.fromkeys(row.method for row in rows)):
            curves: dict[int, list[Band]] = {}
            for row in rows:
                if row.method == method:
                    curves.setdefault(row.branch, []).append(row)
            for place, branch in enumerate(sorted(curves)):
                _branch(axes, sorted(curves[branch], key=lambda row: row.distance), index, method if place == 0 else "")
        for where, _ in ticks(rows):
            axes.axvline(where, color=style.GREY, lw=0.6)
        if ticks(rows):
            axes.set_xticks([where for where, _ in ticks(rows)], [label for _, label in ticks(rows)])
        else:
            axes.set_xlabel("distance in reciprocal space (2π/Å)")
        distances = [row.distance for row in rows]
        if max(distances) > min(distances):
            axes.set_xlim(min(distances), max(distances))
        axes.set_ylabel("frequency (cm⁻¹; imaginary below zero)")
        style.legend(axes, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3)
        return style.save(made, folder, name)


def _branch(axes, points: Sequence[Band], index: int, label: str) -> None:  # type: ignore[no-untyped-def]
    x, y = [p.distance for p in points], [p.frequency_cm1 for p in points]
    line = "-" if len(points) > 1 else "none"
    axes.plot(x, y, color=style.color(index), ls=line, marker=None if len(points) > 1 else style.marker(index), lw=1, label=label or None)
    certain = [p for p in points if p.error_cm1 is not None]
    if certain:
        bars = [p.error_cm1 for p in certain]
        axes.errorbar(
            [p.distance for p in certain], [p.frequency_cm1 for p in certain], yerr=bars, fmt="none", color=style.color(index), capsize=2
        )
