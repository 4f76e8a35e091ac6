"""The first input of a project: ``magus-anharmonic init``, which asks nothing that it can find
out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from magus_anharmonic.errors import InputError
from magus_anharmonic.gate import read_structures
from magus_anharmonic.hull import parse_formula, reduced_formula
from magus_anharmonic.io.files import write_text
from magus_anharmonic.labelers import REGISTRY, available
from magus_anharmonic.search.keys import parse_host_keys
from magus_anharmonic.settings import FOUNDATION, check_pressure, parse, parse_settings
from magus_anharmonic.settings.campaign import CampaignSettings
from magus_anharmonic.settings.phase_diagram import PhaseDiagramSettings
from magus_anharmonic.units import GPa

log = logging.getLogger(__name__)

DATA = Path(__file__).parent / "data"
Kind = Literal["search", "campaign", "phase-diagram"]
FILES: dict[str, str] = {
    "search": "input.yaml",
    "campaign": "campaign.yaml",
    "phase-diagram": "phase-diagram.yaml",
}
LARGEST_CELL, MOST_UNITS = 24, 4
"""Atoms and formula units of a cell of the first search."""
STRUCTURES = ("*.vasp", "*.cif", "*.xyz", "*.extxyz", "POSCAR*", "CONTCAR*", "*.in")


def schema_file(kind: Kind) -> Path:
    """The JSON schema that is shipped for a file of settings."""
    return DATA / "schemas" / FILES[kind].replace(".yaml", ".json")


def write_input(
    kind: Kind,
    compound: str,
    pressures: Sequence[GPa],
    temperatures: Sequence[float] = (0.0,),
    *,
    labeler: str | None = None,
    checkpoint: str | None = None,
    path: Path | None = None,
    force: bool = False,
) -> Path:
    """Write a commented input that passes the checks of its command; returns where.

    labeler : a name of `learning.labeler.calculator`, ``none``, or None for the first DFT code that
    is here. checkpoint : None: the default of the settings. path : a file, or a folder for one of
    the usual name; None: this folder. Files of structures beside it whose composition is the
    compound's are its phases. Raises ``InputError``, also where ``path`` exists and ``force`` is
    not given.
    """
    target = path or Path()
    if target.is_dir():
        target /= FILES[kind]
    if target.exists() and not force:
        raise InputError(f"{target}: exists, and is left as it is; give --force to write over it")
    counts = _counts(compound)
    if kind == "search" and len(pressures) != 1:
        raise InputError(
            "--pressure: a search has one; --kind campaign or phase-diagram takes several"
        )
    n_atoms = sum(counts.values())
    phases = _phases(target.resolve().parent, counts)
    if kind == "phase-diagram" and not phases:
        raise InputError(
            f"{target.resolve().parent}: holds no structure of {compound}; put one file for each"
            " phase there (POSCAR, CIF, extended XYZ): its name becomes the phase's"
        )
    chosen = _labeler(labeler) if kind != "phase-diagram" else None
    text = _rendered(
        kind,
        compound=compound,
        symbols=list(counts),
        formula=list(counts.values()),
        n_atoms=n_atoms,
        n_atoms_largest=n_atoms * max(1, min(MOST_UNITS, LARGEST_CELL // n_atoms)),
        pressures=[f"{_pressure(pressure):g}" for pressure in sorted(set(pressures))],
        temperatures=[f"{temperature:g}" for temperature in sorted(set(temperatures))],
        labeler=chosen,
        pseudopotentials=_pseudopotentials(counts) if chosen == "espresso" else {},
        checkpoint=FOUNDATION if checkpoint is None else checkpoint,
        phases=phases,
        file=target.name,
        schema=schema_file(kind),
    )
    data = yaml.safe_load(text)
    if kind == "search":
        parse_host_keys(parse_settings(data))
    elif kind == "campaign":
        parse(CampaignSettings, data)
    else:
        parse(PhaseDiagramSettings, data)
    write_text(target, text)
    return target


def _rendered(kind: Kind, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(DATA / "init"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template(f"{kind}.yaml").render(**values)


def _counts(compound: str) -> dict[str, int]:
    """Symbol -> atoms in a formula unit, in the order in which they are written."""
    return parse_formula(reduced_formula(compound))


def _pressure(pressure: GPa) -> GPa:
    try:
        return check_pressure(pressure)
    except ValueError as error:
        raise InputError(f"--pressure: {error}") from None


def _labeler(asked: str | None) -> str | None:
    """The code that makes labels; None for none."""
    if asked == "none":
        return None
    if asked is not None:
        usable, why = available(asked)
        if not usable and asked not in REGISTRY:
            raise InputError(f"--labeler: {asked}: {why}")
        if not usable:
            log.warning("labeler %s: %s", asked, why)
        return asked
    found = next((name for name in REGISTRY if available(name)[0]), None)
    log.info("labels: %s", f"by {found}" if found else "none, no DFT code is here (--labeler)")
    return found


def _pseudopotentials(symbols: Iterable[str]) -> dict[str, str]:
    """Of each element the first file in ``ESPRESSO_PSEUDO`` of a functional that all elements have
    (PBE before others); without one, the first whose name begins with the element."""
    from magus_anharmonic.labelers.espresso import by_functional

    folder, symbols = Path(os.environ.get("ESPRESSO_PSEUDO", ".")), list(symbols)
    shared = by_functional(folder, symbols)
    if shared:
        chosen = shared[min(shared, key=lambda name: (name != "PBE", name))]
        return {symbol: chosen[symbol][0] for symbol in symbols}
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.[uU][pP][fF]"), reverse=True):
        symbol = file.name.split(".")[0].split("_")[0].split("-")[0].capitalize()
        found[symbol] = file.name
    return {symbol: found.get(symbol, f"{symbol}.upf") for symbol in symbols}


def _phases(folder: Path, counts: dict[str, int]) -> dict[str, str]:
    """Name -> file of the structures of this composition in ``folder``."""
    phases: dict[str, str] = {}
    for file in sorted({path for pattern in STRUCTURES for path in folder.glob(pattern)}):
        try:
            last = read_structures(file)[-1]
        except InputError as error:
            log.info("no phase: %s", error)
            continue
        name = (file.stem if file.suffix else file.name).replace(" ", "_").replace(",", "_")
        if _counts(last.get_chemical_formula()) == counts:
            phases.setdefault(name, file.name)
    return phases
