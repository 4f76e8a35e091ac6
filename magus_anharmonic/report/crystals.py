"""The structures of a report: found among all that a run stored, and written as CIF, POSCAR and extxyz beside the page."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.files import TEMPORARY, raise_trouble, safe_name
from magus_anharmonic.report.rankings import Line, RankingView
from magus_anharmonic.structures import bare, space_group

Kind = Literal["static", "centroids"]

FILES = 100
"""Most structures of one ranking that are written: the paper's number of free energies."""

ALL = "structures.extxyz"
OWN = re.compile(r"[^.].*GPa-.*-(static|centroids)\.(cif|vasp)")
"""Names of the files that `write_structures` makes."""

WORDS: dict[Kind, str] = {"static": "ions at rest", "centroids": "mean positions of the moving ions"}


@dataclass(frozen=True)
class Crystal:
    """One structure of a ranking: as relaxed statically, or the SSCHA centroids."""

    line: Line
    pressure: float
    temperature: float
    kind: Kind
    space_group: str
    atoms: Atoms

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        what = f"{self.line.formula} {self.space_group}, {WORDS[self.kind]}, {self.pressure:g} GPa"
        return what + (f", {self.temperature:g} K" if self.kind == "centroids" else "")

    @property
    def stem(self) -> str:
        """File name without suffix, whatever the id holds."""
        rank = "" if self.line.rank is None else f"{self.line.rank:03d}-"
        heat = f"-{self.temperature:g}K" if self.kind == "centroids" else ""
        return f"{self.pressure:g}GPa{heat}-{rank}{safe_name(self.line.id)}-{self.kind}"


def campaign_crystals(path: Path, rankings: Iterable[RankingView]) -> list[Crystal]:
    """Structures of the rankings' first lines from ``structures.extxyz``, in the order of the rankings.

    The file is read frame by frame, and only frames that are wanted become structures. Raises ``InputError``: not extxyz.
    """
    if not path.is_file():
        return []
    wanted = {(line.id, ranking.pressure) for ranking in rankings for line in ranking.lines[:FILES]}
    found: dict[tuple[str, float, str], Atoms] = {}
    for comment, text in _frames(path):
        key = (_info(comment, "id"), _float(_info(comment, "pressure_GPa")))
        kind = _info(comment, "kind") or "static"
        if key in wanted and (*key, kind) not in found:
            found[*key, kind] = _parsed(path, text)
    return _in_order(found, rankings)


def _in_order(found: dict[tuple[str, float, str], Atoms], rankings: Iterable[RankingView]) -> list[Crystal]:
    crystals = []
    for ranking in rankings:
        for line in ranking.lines[:FILES]:
            for kind in WORDS:
                atoms = found.get((line.id, ranking.pressure, kind))
                if atoms is not None:
                    crystals.append(_crystal(line, ranking, kind, atoms))
    return crystals


def _crystal(line: Line, ranking: RankingView, kind: Kind, atoms: Atoms) -> Crystal:
    group = (line.static if kind == "static" else line.quantum) or space_group(atoms)
    return Crystal(line, ranking.pressure, ranking.temperature, kind, group, bare(atoms))


def _frames(path: Path) -> Iterator[tuple[str, str]]:
    """(comment line, whole text) of every frame of an extxyz file, none of them parsed."""
    with path.open(encoding="utf-8", errors="replace") as file:
        number = 0
        for first in file:
            number += 1
            if not first.strip():
                continue
            try:
                natoms = int(first)
            except ValueError:
                raise InputError(f"{path.name}: line {number}: {first.strip()[:40]!r} should be a number of atoms (extxyz)") from None
            body = list(islice(file, natoms + 1))
            number += len(body)
            if len(body) < natoms + 1:
                return  # the last frame was cut short by a kill
            yield body[0], first + "".join(body)


def _info(comment: str, key: str) -> str:
    """The text of one key of an extxyz comment line, as written: ASE would read an id such as 12345e678901 as a number."""
    match = re.search(rf'(?:^|\s){key}=(?:"((?:[^"\\]|\\.)*)"|(\S+))', comment)
    return "" if match is None else (match[1] or match[2] or "").replace('\\"', '"')


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _parsed(path: Path, text: str) -> Atoms:
    from ase.io import read

    try:
        return read(io.StringIO(text), format="extxyz")
    except Exception as error:  # ASE raises whatever its parser trips over
        raise InputError(f"{path.name}: a frame is not readable as extxyz ({type(error).__name__}: {error})") from None


def search_crystals(anharmonic: Path, rankings: Iterable[RankingView], starts: Callable[[], Mapping[str, Atoms]]) -> list[Crystal]:
    """Structures of the rankings' first lines from what a search or ``rank`` leaves: the populations and ``quantum.traj``.

    ``starts`` : asked (see `stored_starts`) when these hold not all.
    """
    statics: dict[str, Atoms] = {}
    results = anharmonic.parent
    for path in [results / "good.traj", *sorted(results.glob("gen*.traj"), key=_generation, reverse=True)[:1]]:
        for atoms in _traj(path):
            statics.setdefault(str(atoms.info.get("candidate_id", "")), atoms)
    centroids = {str(atoms.info.get("sscha_folder", "")): atoms for atoms in _traj(anharmonic / "quantum.traj")}
    if any(line.id not in statics for ranking in rankings for line in ranking.lines[:FILES]):
        for name, atoms in starts().items():
            statics.setdefault(name, atoms)
    crystals = []
    for ranking in rankings:
        for line in ranking.lines[:FILES]:
            if line.id in statics:
                crystals.append(_crystal(line, ranking, "static", statics[line.id]))
            if line.folder and line.folder in centroids:
                crystals.append(_crystal(line, ranking, "centroids", centroids[line.folder]))
    return crystals


def _generation(path: Path) -> int:
    digits = re.sub(r"\D", "", path.stem)
    return int(digits) if digits else 0


def _traj(path: Path) -> list[Atoms]:
    from ase.io import iread

    if not path.is_file():
        return []
    try:
        return list(iread(path, index=":", format="traj"))
    except Exception as error:  # whatever ASE trips over in a damaged file
        raise_trouble(error, path)
        raise InputError(f"{path.name}: not readable ({type(error).__name__}: {error})") from None


def stored_starts(anharmonic: Path) -> dict[str, Atoms]:
    """Structures of the database by their ids; raises ``MagusAnharmonicError`` when it cannot be read now."""
    from magus_anharmonic.ranking.store import NAME, read_records

    path = anharmonic / NAME
    return {record.structure: record.start for record in read_records(path)} if path.is_file() else {}


def write_structures(folder: Path, crystals: Iterable[Crystal]) -> int:
    """``NAME.cif`` and ``NAME.vasp`` (a POSCAR) for each and all of them in ``structures.extxyz``; returns how many.

    Files of an earlier report that this one does not write are removed, others in ``folder`` are left alone. Each file is whole or
    absent; none is flushed to disk by itself, since all can be made again.
    """
    from ase.io import write

    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-", suffix=TEMPORARY) as making:
        for crystal in crystals:
            write(Path(making) / f"{crystal.stem}.cif", crystal.atoms, format="cif")
            write(Path(making) / f"{crystal.stem}.vasp", crystal.atoms, format="vasp", direct=True, sort=True)
            frames.append(_frame(crystal))
        if frames:
            write(Path(making) / ALL, frames, format="extxyz")
        new = sorted(Path(making).iterdir())
        for path in new:
            path.replace(folder / path.name)
    names = {path.name for path in new}
    for path in folder.iterdir():
        if path.name not in names and (path.name == ALL or OWN.fullmatch(path.name)):
            path.unlink()
    return len(frames)


def _frame(crystal: Crystal) -> Atoms:
    frame = crystal.atoms.copy()
    frame.info = {
        "id": crystal.line.id,
        "formula": crystal.line.formula,
        "space_group": crystal.space_group,
        "pressure_GPa": crystal.pressure,
        "kind": crystal.kind,
        "file": crystal.stem,
    }
    return frame
