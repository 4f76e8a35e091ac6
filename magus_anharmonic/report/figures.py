"""The pictures of a report, as data URIs with a text for those who do not see them."""

from __future__ import annotations

import base64
import io
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.tables import text_rows
from magus_anharmonic.ranking.candidate import Candidate, numbered
from magus_anharmonic.report.raw_tables import number
from magus_anharmonic.units import ev_to_mev

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_SVG = 400_000
"""Bytes; a larger vector picture is replaced by the PNG beside it, so that the page fits into a
mail."""

LARGEST = 1_500_000

TITLES = (
    ("model", "Errors of the models"),
    ("table", "Errors of the models"),
    ("parity", "Model against DFT"),
    ("enthalpy_volume", "Enthalpy against volume"),
    ("enthalpy-volume", "Enthalpy against volume"),
    ("enthalp", "Relative enthalpy against pressure"),
    ("mode", "Squared frequency against pressure"),
    ("dispersion", "Anharmonic dispersion"),
    ("ranking", "Enthalpy and free energy"),
    ("gradient", "What averaging leaves of the errors"),
    ("error", "What averaging leaves of the errors"),
    ("learning", "Learning curves"),
    ("phase", "Phase diagram"),
)
"""Beginnings of figures' names and what they show; the first that fits."""


@dataclass(frozen=True)
class Picture:
    """One figure: ``uri`` is the picture itself, ``alt`` what it shows in words, ``data`` the file
    with its numbers."""

    name: str
    title: str
    alt: str
    uri: str
    data: str = ""
    wide: bool = False


def stored_pictures(folder: Path) -> list[Picture]:
    """Every figure of ``figures/``: ``NAME.svg`` or, when that is large or absent, ``NAME.png``;
    described from its own text or CSV."""
    names = sorted({path.stem for path in (*folder.glob("*.svg"), *folder.glob("*.png"))})
    found = (stored_picture(folder, name) for name in names)
    return [picture for picture in found if picture is not None]


def stored_picture(folder: Path, name: str, *, title: str = "", alt: str = "") -> Picture | None:
    """One figure of a folder; None when its file is empty or too large for a page. ``title``,
    ``alt``: instead of its own words."""
    vector, pixels, table = (folder / f"{name}{suffix}" for suffix in (".svg", ".png", ".csv"))
    choice = (
        vector
        if vector.is_file() and (vector.stat().st_size <= LARGEST_SVG or not pixels.is_file())
        else pixels
    )
    if not choice.is_file() or not 0 < choice.stat().st_size <= LARGEST:
        return None
    content = choice.read_bytes()
    own_title, own_alt = _own_words(vector) if vector.is_file() else ("", "")
    title = title or own_title or title_of(name)
    alt = alt or own_alt or described(title, table)
    return Picture(
        name,
        title,
        alt,
        _uri(content, choice.suffix),
        table.name if table.is_file() else "",
        _wide(content),
    )


def title_of(name: str) -> str:
    """What a figure shows, from its file name, with whatever the name says besides:
    ``dispersion-Im-3m-60GPa``."""
    for prefix, words in TITLES:
        if name.lower().startswith(prefix):
            rest = re.sub(r"^[A-Za-z_]*[-_]?", "", name[len(prefix) :]).replace("_", " ").strip()
            return f"{words}: {rest}" if rest else words
    return name.replace("_", " ").replace("-", " ").capitalize()


def _own_words(path: Path) -> tuple[str, str]:
    """Title and description that the SVG carries as Dublin Core metadata (matplotlib:
    ``metadata={"Title": ..., "Description": ...}``)."""
    try:
        head = path.read_text(encoding="utf-8", errors="replace")[:8000]
        block = re.search(r"<metadata>.*?</metadata>", head, re.DOTALL)
        root = ElementTree.fromstring(block[0]) if block else None
    except ElementTree.ParseError:
        return "", ""
    if root is None:
        return "", ""
    work = root.find(
        ".//{*}Work"
    )  # its children alone: the program that made the picture has a title too
    words = {
        element.tag.rsplit("}", 1)[-1]: (element.text or "").strip()
        for element in (work if work is not None else ())
    }
    return words.get("title", ""), words.get("description", "")


def described(title: str, table: Path) -> str:
    """``title`` and the ranges of the numbers in the figure's CSV."""
    if not table.is_file():
        return f"{title}."
    spans: dict[str, tuple[float, float]] = {}
    count = 0
    try:
        for row in text_rows(table, shown=table.name):
            count += 1
            for column, text in row.items():
                value = number(text)
                if value is not None:
                    low, high = spans.get(column, (value, value))
                    spans[column] = (min(low, value), max(high, value))
    except InputError:
        return f"{title}. Its numbers in {table.name} cannot be read."
    told = "; ".join(
        f"{column} from {low:.4g} to {high:.4g}" for column, (low, high) in list(spans.items())[:6]
    )
    return f"{title}, {count} {'point' if count == 1 else 'points'}. {told}.".replace(". .", ".")


def drawn(figure: Figure, name: str, title: str, alt: str, data: str = "") -> Picture:
    """A matplotlib figure as a picture, text as text where the browser has the font."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Title": title, "Description": alt}
        )
    return Picture(
        name, title, alt, _uri(buffer.getvalue(), ".svg"), data, _wide(buffer.getvalue())
    )


def _wide(content: bytes) -> bool:
    """Several panels side by side: wider than 1.8 times the height, by the view box of an SVG or
    the header of a PNG."""
    if content.startswith(b"\x89PNG"):
        width, height = struct.unpack(">II", content[16:24].ljust(8, b"\0"))
    else:
        box = re.search(rb'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', content[:4000])
        width, height = (float(box[1]), float(box[2])) if box else (1.0, 1.0)
    return width > 1.8 * height


def _uri(content: bytes, suffix: str) -> str:
    kind = "image/svg+xml" if suffix == ".svg" else "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def slope_chart_picture(rows: Sequence[Candidate], where: str, data: str) -> Picture | None:
    """Slope chart of enthalpies and free energies; None without a free energy."""
    from magus_anharmonic.report.summary import slope_chart

    best = [row for row in numbered([row for row in rows if row.phase_ranked]) if row.rank_quantum]
    if not best:
        return None
    order = ", ".join(
        f"{row.rank_quantum}. {row.spg_quantum or row.spg_static} (place"
        f" {row.rank_static or '-'} by enthalpy)"
        for row in best[:5]
    )
    alt = (
        f"Slope chart at {where}: enthalpy on the left, free energy on the right,"
        f" joined by lines. By free energy: {order}."
    )
    return drawn(
        slope_chart(rows), f"ranking-{where}", f"Enthalpy and free energy at {where}", alt, data
    )


def learning_picture(points: Sequence[dict[str, Any]], data: str) -> Picture | None:
    """Errors of energy (meV/atom) and forces (meV/A) on the validation labels against the number of
    labels; None without a point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not points:
        return None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    steps = list(dict.fromkeys(point["step"] for point in points))
    for axes, key, label in zip(
        panels, ("energy", "force"), ("energy RMSE (meV/atom)", "force RMSE (meV/Å)"), strict=True
    ):
        for index, step in enumerate(steps):
            mine = [point for point in points if point["step"] == step and point[key] is not None]
            axes.plot(
                [p["generation"] for p in mine],
                [ev_to_mev(p[key]) for p in mine],
                "o-",
                color=f"C{index}",
                ms=4,
                lw=1.3,
                label=step,
            )
        axes.set_xlabel("generation")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if len(steps) > 1:
        panels[0].legend(fontsize=7, frameon=False)
    return drawn(
        figure,
        "learning",
        "Learning curves",
        f"Errors on the validation labels after each generation. {_learned(points)}",
        data,
    )


def _learned(points: Iterable[dict[str, Any]]) -> str:
    told = []
    by_step: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        by_step.setdefault(point["step"], []).append(point)
    for step, mine in by_step.items():
        energies = [ev_to_mev(point["energy"]) for point in mine if point["energy"] is not None]
        if energies:
            told.append(
                f"{step}: energy {energies[0]:.3g} meV/atom at first, {energies[-1]:.3g} at the end"
            )
    return "; ".join(told) + "." if told else ""
