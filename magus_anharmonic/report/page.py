"""``report.html``: one page that holds all it needs, and the structures beside it.

The page works from a mail attachment: no request leaves it. Its content security policy allows only
the scripts whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import magus_anharmonic
from magus_anharmonic.io.files import write_text
from magus_anharmonic.io.tables import number
from magus_anharmonic.report.contents import Contents, gather
from magus_anharmonic.report.structures import Crystal, as_json, scene, still, write_structures
from magus_anharmonic.units import duration

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
NAME = "report.html"
VIEWED = 8
"""Structures of one ranking that the viewer offers, each static and with SSCHA."""

MOST_VIEWED = 60

UNITS = (
    ("_meV_per_atom", "meV/atom"),
    ("_eV_per_atom", "eV/atom"),
    ("_eV_per_A", "eV/Å"),
    ("_A", "Å"),
    ("_A3_per_atom", "Å\N{SUPERSCRIPT THREE}/atom"),
    ("_GPa", "GPa"),
    ("_cm2", "cm\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT TWO}"),
    ("_cm1", "cm\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT ONE}"),
    ("_K", "K"),
    ("_s", "s"),
)


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` and ``structures/`` (CIF, POSCAR, extxyz) for a campaign, a search, a
    ranking or a phase diagram; returns the page.

    ``folder``: where the campaign or search was run, or what it left (``campaign/``,
    ``results/anharmonic/``, the output of ``rank``). A half-finished run gives a page that says
    what is missing. Raises ``InputError`` when there is nothing of ours in ``folder``.
    """
    contents = gather(folder)
    written = 0
    if contents.kind != "phase diagram":
        written = write_structures(contents.folder / "structures", contents.crystals)
    target = contents.folder / NAME
    write_text(target, render(contents))
    log.info(
        "%s: rankings: %d, figures: %d, structures: %d",
        target,
        len(contents.rankings),
        len(contents.pictures),
        written,
    )
    return target


def render(contents: Contents) -> str:
    """The page as text; everything that comes from files is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        heading=heading,
        cell=cell,
        duration=duration,
        thousands=thousands,
        milli=milli,
        percent=percent,
        anchor=anchor,
        moment=moment,
    )
    viewed = chosen(contents.crystals)
    scenes = [scene(crystal) for crystal in viewed]
    scripts = {"own": _text("templates/report.js")}
    if viewed:
        scripts["viewer"] = _text("vendor/3Dmol-min.js").replace("</script", "<\\/script")
    return environment.get_template("report.html").render(
        c=contents,
        record=contents.record,
        settings=yaml.safe_dump(
            contents.record.get("settings", {}), sort_keys=False, allow_unicode=True
        ),
        packages=contents.record.get("packages") or {},
        made=moment(datetime.now(UTC)),
        version=magus_anharmonic.__version__,
        viewed=[
            {
                "label": crystal.label,
                "still": Markup(still(drawn, crystal.label)),
                "crystal": crystal,
                "conventional": drawn.conventional,
            }
            for crystal, drawn in zip(viewed, scenes, strict=True)
        ],
        scenes=[
            {"label": crystal.label, **as_json(drawn)}
            for crystal, drawn in zip(viewed, scenes, strict=True)
        ],
        view_of={
            (c.line.id, c.pressure, c.temperature): index
            for index, c in reversed(list(enumerate(viewed)))
        },
        style=Markup(_text("templates/report.css")),
        scripts={name: Markup(text) for name, text in scripts.items()},
        policy=policy(list(scripts.values())),
    )


def moment(text: object) -> str:
    """``"2026-11-25 02:39 UTC"`` of a time in ISO format; anything else as it is."""
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(text)


def policy(scripts: list[str]) -> str:
    """Content security policy: no network, pictures from the page itself, and only these
    scripts."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:;"
        " base-uri 'none'; form-action 'none'"
    )


def chosen(crystals: list[Crystal]) -> list[Crystal]:
    """What the viewer offers: the lowest of every ranking in turn, both kinds of a structure
    together."""
    groups: dict[tuple[float, float], dict[str, list[Crystal]]] = {}
    for crystal in crystals:
        groups.setdefault((crystal.pressure, crystal.temperature), {}).setdefault(
            crystal.line.id, []
        ).append(crystal)
    kept: set[int] = set()
    for index in range(VIEWED):
        for structures in groups.values():
            both = list(structures.values())[index] if index < len(structures) else []
            if len(kept) + len(both) <= MOST_VIEWED:
                kept.update(id(crystal) for crystal in both)
    return [crystal for crystal in crystals if id(crystal) in kept]


def heading(column: str) -> str:
    """``energy_rmse_eV_per_atom`` -> ``energy RMSE (eV/atom)``."""
    for suffix, unit in UNITS:
        if column.endswith(suffix):
            column = f"{column.removesuffix(suffix)} ({unit})"
            break
    words = column.replace("_", " ").replace("rmse", "RMSE").replace("spg ", "space group ")
    return re.sub(r"^n (?=[a-z])", "number of ", words)


def cell(text: str) -> str:
    """A number with five digits, anything else as it is."""
    value = number(text)
    return (
        text
        if value is None or text.lstrip("-").isdigit() or re.fullmatch(r"[0-9a-f]{12}", text)
        else f"{value:.5g}"
    )


def milli(value: float | None) -> str:
    """A number of meV, or a dash."""
    return "\N{EN DASH}" if value is None else f"{value:.1f}"


def percent(value: float | None) -> str:
    """A probability, or a dash."""
    return "\N{EN DASH}" if value is None else f"{value:.0%}".replace("%", " %")


def thousands(value: Any) -> str:
    """``12345`` -> ``12,345``; a dash for None."""
    return "\N{EN DASH}" if value is None else f"{value:,.0f}"


def anchor(text: str) -> str:
    """A fragment identifier from any text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
