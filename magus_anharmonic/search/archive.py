"""The ``results/`` folder in MAGUS's layout, written so that a killed search can go on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write

from magus_anharmonic.errors import InputError
from magus_anharmonic.files import replacing, write_json
from magus_anharmonic.structures import structure_id

log = logging.getLogger(__name__)

STATE = "search.json"
FIXED_KEYS = ("pressure", "symbols", "formula_type", "seed")
FIXED_HOST_KEYS = ("formula",)


class Archive:
    """``results/{init,raw,gen,good,keep}{g}.traj``, ``good.traj``, ``best.traj`` and ``results/anharmonic/``.

    A generation counts as finished when ``search.json`` says so, which is the last file it writes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.results = directory / "results"
        self.anharmonic = self.results / "anharmonic"
        self.seeds = directory / "Seeds"

    def start(self) -> None:
        """Move an existing ``results`` to ``results1``, ``results2``, ... as MAGUS does, and make a new one."""
        if self.results.exists():
            number = 1
            while (self.directory / f"results{number}").exists():
                number += 1
            self.results.rename(self.directory / f"results{number}")
            log.info("the earlier results are now in results%d", number)
        self.anharmonic.mkdir(parents=True)

    def save(self, name: str, generation: int | str, population: Sequence[Atoms], units: list[Atoms] | None = None) -> None:
        """Write ``{name}{generation}.traj`` atomically; fitness is not kept, as in MAGUS."""
        frames = []
        for atoms in population:
            frame = atoms.copy()
            frame.info = {**atoms.info, "type": "Bulk", "fitness": {}}
            if units is not None:
                frame.info["units"] = units
            frames.append(frame)
        write_frames(self.results / f"{name}{generation}.traj", frames)

    def has(self, name: str, generation: int | str) -> bool:
        """Whether a file of this search was written already."""
        return (self.results / f"{name}{generation}.traj").exists()

    def load(self, name: str, generation: int | str) -> list[Atoms]:
        """The population of a file of this search."""
        return read_frames(self.results / f"{name}{generation}.traj")

    def finished(self) -> tuple[int, float]:
        """Number of the last finished generation (0: none) and the volume ratio for the next (nan before the first)."""
        file = self.anharmonic / STATE
        if not file.exists():
            return 0, float("nan")
        state = json.loads(file.read_text(encoding="utf-8"))
        return int(state["finished"]), float(state["volume_ratio"])

    def finish(self, generation: int, volume_ratio: float) -> None:
        """Record that every file of ``generation`` is there."""
        write_json(self.anharmonic / STATE, {"finished": generation, "volume_ratio": volume_ratio})

    def read_seeds(self, generation: int) -> list[Atoms]:
        """``Seeds/POSCARS_{g}`` (several structures, XDATCAR-like) and ``Seeds/seeds_{g}.traj``, as MAGUS reads them."""
        frames: list[Atoms] = []
        own = self._own_seeds(generation)
        if own.exists():
            frames.extend(read_frames(own))
        for name, form in ((f"POSCARS_{generation}", "vasp-xdatcar"), (f"seeds_{generation}.traj", "traj")):
            file = self.seeds / name
            if file.exists() and file.stat().st_size > 0:
                try:
                    frames.extend(read(file, index=":", format=form))
                except (OSError, ValueError, IndexError, KeyError) as error:
                    raise InputError(f"{file}: not readable as seeds ({form}): {error}") from None
        for frame in frames:
            if frame.cell.rank < 3:
                raise InputError(f"{self.seeds}: a seed of generation {generation} ({frame.get_chemical_formula()}) has no cell")
        return frames

    def write_seeds(self, generation: int, structures: Sequence[Atoms]) -> None:
        """Keep SSCHA centroids as seeds of ``generation``; those that an earlier one was given are left out."""
        earlier = {
            structure_id(atoms) for g in range(generation) if self._own_seeds(g).exists() for atoms in read_frames(self._own_seeds(g))
        }
        new = [atoms for atoms in structures if structure_id(atoms) not in earlier]
        if new:
            write_frames(self._own_seeds(generation), new)
            log.info("%d SSCHA centroids are seeds of generation %d", len(new), generation)
        else:
            self._own_seeds(generation).unlink(missing_ok=True)

    def _own_seeds(self, generation: int) -> Path:
        return self.anharmonic / "seeds" / f"seeds_{generation}.traj"


def write_frames(file: Path, frames: Sequence[Atoms]) -> None:
    """Write structures to a .traj file atomically."""
    with replacing(file) as temporary:
        write(temporary, list(frames), format="traj")


def read_frames(file: Path) -> list[Atoms]:
    """Structures of a .traj file, without calculators; forces and stress in ``info`` as arrays."""
    frames = list(read(file, index=":", format="traj"))
    for frame in frames:
        frame.calc = None
        for key in ("forces", "stress", "priNum"):
            if key in frame.info:
                frame.info[key] = np.asarray(frame.info[key])
    return frames


def compare_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of settings that changed between a search and its restart.

    Raises ``InputError`` when one changed that the structures found so far depend on.
    """
    changed = [key for key in now if key != "host" and before.get(key) != now[key]]
    old, new = before.get("host", {}), now.get("host", {})
    changed_host = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    fixed = [key for key in changed if key in FIXED_KEYS] + [key for key in changed_host if key in FIXED_HOST_KEYS]
    values = {**before, **old}, {**now, **new}
    if fixed:
        raise InputError(
            *(
                f"{key}: {values[1].get(key)!r} but the search was started with {values[0].get(key)!r}; start anew without -r"
                for key in fixed
            )
        )
    return changed + changed_host
