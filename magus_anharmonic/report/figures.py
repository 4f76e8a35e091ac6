"""The pictures of a report, as data URIs with a text for those who do not see them."""

from __future__ import annotations

import base64
import io
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from magus_anharmonic.errors import InputError
from magus_anharmonic.io import pictures
from magus_anharmonic.io.tables import number, text_rows
from magus_anharmonic.paper import script
from magus_anharmonic.paper.tables import LearningPoint
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.report.text import RankingView
from magus_anharmonic.units import ev_to_mev

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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


def stored_pictures(
    folder: Path, words: Mapping[str, Mapping[str, str]] | None = None
) -> list[Picture]:
    """Every figure of a folder: ``NAME.svg`` or, when that is large or absent, ``NAME.png``;
    described by ``words`` (name -> title and alt), else from its own text or CSV."""
    names = sorted({path.stem for path in (*folder.glob("*.svg"), *folder.glob("*.png"))})
    known = words or {}
    found = (stored_picture(folder, name, **known.get(name, {})) for name in names)
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
    """A matplotlib figure as a picture; call it inside `pictures.figure`."""
    buffer = io.BytesIO()
    words = {"Date": None, "Title": title, "Description": alt}
    figure.savefig(buffer, format="svg", metadata=words)
    content = buffer.getvalue()
    return Picture(name, title, alt, _uri(content, ".svg"), data, _wide(content))


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


def slope_chart_picture(view: RankingView) -> Picture | None:
    """Slope chart of enthalpies and free energies; None without a free energy."""
    best = [row for row in view.rows if row.rank_quantum]
    if not best:
        return None
    order = ", ".join(
        f"{row.rank_quantum}. {row.spg_quantum or row.spg_static} ({row.rank_static or '-'}. by"
        " enthalpy)"
        for row in best[:5]
    )
    title = f"Enthalpy and free energy of {view.title}"
    with pictures.figure(size=CHART) as (figure, (axes,)):
        _draw_slopes(axes, view.rows)
        return drawn(figure, f"ranking-{view.title}", title, f"By G: {order}.", view.file)


def slope_chart(rows: Sequence[Candidate], folder: Path, name: str) -> list[Path]:
    """Static enthalpy against free energy order of one composition, ``NAME.svg`` and ``.png``."""
    with pictures.figure(size=CHART) as (figure, (axes,)):
        _draw_slopes(axes, rows)
        return pictures.save(figure, folder, name)


CHART = (6.4, 4.4)
"""Inches."""


def _draw_slopes(axes: Axes, rows: Sequence[Candidate]) -> None:
    """What was found below a saddle point has no static enthalpy of its own and stands on the right
    alone."""
    done = sorted((row for row in rows if row.ranked), key=lambda row: row.gibbs)[:10]
    axes.set_ylabel("meV/atom above the lowest")
    axes.set_xticks([0, 1], ["static enthalpy H", "free energy G (SSCHA)"])
    axes.set_xlim(-0.55, 1.55)
    if not done:
        axes.text(0.5, 0.5, "no free energies", ha="center", transform=axes.transAxes)
        return
    first = done[0]
    axes.set_title(f"{first.formula} at {first.pressure:g} GPa, {first.temperature:g} K")
    lowest = min((row.enthalpy for row in done if row.enthalpy is not None), default=0.0)
    static = [0.0 if row.enthalpy is None else ev_to_mev(row.enthalpy - lowest) for row in done]
    gibbs = [ev_to_mev(row.gibbs - first.gibbs) for row in done]
    bars = [ev_to_mev(row.gibbs_error or 0.0) for row in done]
    gap = 0.05 * (max(*static, *gibbs) or 1.0)
    reach = [bar + 0.2 * gap for bar in bars]
    lanes = pictures.lanes(*(np.add(gibbs, np.multiply(sign, reach)) for sign in (-1, 1)))
    right = [1 + 0.03 * lane for lane in lanes]
    edge = max(right) + 0.06
    axes.set_xlim(-0.85, edge + 0.5)
    labels = {"va": "center", "fontsize": 8}
    for i, (row, left, after) in enumerate(
        zip(done, _spread(static, gap), _spread(gibbs, gap), strict=True)
    ):
        color = pictures.color(i)
        if row.enthalpy is not None:
            axes.plot([0, right[i]], [static[i], gibbs[i]], color=color, lw=1.2, alpha=0.8)
            axes.plot([0], [static[i]], "o", color=color)
            name = f"{row.spg_static}  {row.label}"
            axes.text(-0.06, left, name, ha="right", color=color, **labels)
        axes.errorbar(right[i], gibbs[i], bars[i], fmt="o", color=color, capsize=3)
        axes.text(edge, after, row.spg_quantum or row.spg_static, color=color, **labels)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Label heights pushed apart so that none overlap."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for below, above in zip(order, order[1:], strict=False):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed


def learning_picture(points: Sequence[LearningPoint], data: str) -> Picture | None:
    """Errors of the models of a search on one set of labels, as the campaign's figure shows them;
    None without a point."""
    if not points:
        return None
    drawing = script("figures").learning(points)
    with pictures.figure(*drawing.panels) as (figure, panels):
        drawing.draw(panels)
        return drawn(figure, drawing.name, drawing.title, drawing.alt, data)
