"""The ``results/`` folder in MAGUS's layout, written so that a killed search can go on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import Trajectory, read, write

from magus_anharmonic.errors import DamagedFile, InputError
from magus_anharmonic.gate import check_structures, isotope_hint
from magus_anharmonic.io.digests import time_stamp
from magus_anharmonic.io.files import (
    append_jsonl,
    read_as,
    read_jsonl,
    read_whole,
    readable,
    remove,
    remove_empty,
    replacing,
    seal,
    unsealed,
    write_json,
)
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.runs.lock import forget_dead
from magus_anharmonic.runs.record import SearchState
from magus_anharmonic.search.population import copied, select_best
from magus_anharmonic.structures import structure_id

log = logging.getLogger(__name__)

BEST = "best.traj"


class Archive:
    """``results/{init,raw,gen,good,keep}{g}.traj``, ``good.traj``, ``best.traj`` and
    ``results/anharmonic/``.

    A generation counts as finished when ``search.json`` says so, which is the last file it writes;
    ``generations.jsonl`` has a line for each.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.results = directory / "results"
        self.anharmonic = self.results / "anharmonic"
        self.files = SearchFolder(self.anharmonic)
        self.seeds = directory / "Seeds"

    def start(self) -> None:
        """Move an existing ``results`` to ``results1``, ``results2``, ... as MAGUS does, and make a
        new one."""
        if self.results.exists():
            number = 1
            while (self.directory / f"results{number}").exists():
                number += 1
            earlier = self.results.rename(self.directory / f"results{number}")
            if forget_dead(earlier / self.anharmonic.name) and remove_empty(earlier):
                log.info("the earlier search was stopped before it wrote anything")
            else:
                log.info("the earlier results are now in results%d", number)
        elif self.results.is_symlink():
            raise InputError(
                f"{self.results}: a link to {self.results.readlink()}, which is not there; make"
                " that folder, or remove the link"
            )
        try:
            self.anharmonic.mkdir(parents=True)
        except FileExistsError:
            raise InputError(
                f"{self.results}: another search was started here at the same moment; work in"
                " another folder"
            ) from None

    def save(
        self,
        name: str,
        generation: int | str,
        population: Sequence[Atoms],
        units: list[Atoms] | None = None,
    ) -> None:
        """Write ``{name}{generation}.traj`` atomically; fitness is not kept, as in MAGUS."""
        write_frames(self.results / f"{name}{generation}.traj", _as_saved(population, units))

    def add_best(self, best: Sequence[Atoms], units: list[Atoms]) -> None:
        """Append the best structures of a generation to ``best.traj`` atomically; those before stay
        on disk, out of memory."""
        file = self.results / BEST
        with replacing(file) as temporary:
            if file.exists():
                temporary.write_bytes(unsealed(file))
            append_frames(temporary, _as_saved(best, units))
            seal(temporary)

    def restore_best(self, generation: int) -> None:
        """Make ``best.traj`` end with ``generation``, the last finished one, as it did then.

        A kill between that file and ``search.json`` leaves an unfinished generation in it; a
        damaged one is made anew. Appended generation by generation, as in a search that nobody
        killed, the bytes are the same.
        """
        file = self.results / BEST
        best = whole_frames(file)
        if best and best[-1].info.get("best_of") == generation:
            return
        remove(file)
        if generation == 0:
            return
        with replacing(file) as temporary:
            for g in range(1, generation + 1):
                known = [atoms for atoms in best or () if atoms.info.get("best_of") == g]
                append_frames(temporary, known or best_of(self.load("good", g), g))
            seal(temporary)

    def has(self, name: str, generation: int | str) -> bool:
        """Whether a file of this search was written already."""
        return (self.results / f"{name}{generation}.traj").exists()

    def load(self, name: str, generation: int | str) -> list[Atoms]:
        """The population of a file of this search; raises ``DamagedFile``."""
        return read_frames(self.results / f"{name}{generation}.traj")

    def known(self, name: str, generation: int) -> list[Atoms] | None:
        """The population of a file that can be made anew: None when it is not there, or is damaged
        and now set aside."""
        return whole_frames(self.results / f"{name}{generation}.traj")

    def finished(self) -> tuple[int, float]:
        """Number of the last finished generation (0: none) and the volume ratio for the next (nan
        before the first)."""
        for generation, ratio in sorted(self._history().items(), reverse=True):
            try:
                for name in ("gen", "good", "keep"):
                    self.load(name, generation)
            except DamagedFile as error:
                log.warning("%s; generation %d is done again", error, generation)
            else:
                return generation, ratio
        return 0, float("nan")

    def _history(self) -> dict[int, float]:
        """Volume ratio after each finished generation."""
        file = self.files.state
        lines = read_jsonl(self.files.history, {"generation": int, "volume_ratio": float | int})
        found = {line["generation"]: float(line["volume_ratio"]) for line in lines}
        last = max(found, default=0)
        if file.exists():
            try:
                state = read_as(SearchState, file)
                last = state.finished
                found.setdefault(last, state.volume_ratio)
            except DamagedFile as error:
                log.warning("%s; %s says how far the search came", error, "generations.jsonl")
        return {generation: ratio for generation, ratio in found.items() if generation <= last}

    def finish(self, generation: int, volume_ratio: float, seconds: float = 0.0) -> None:
        """Record that every file of ``generation`` is there."""
        line = {
            "generation": generation,
            "volume_ratio": volume_ratio,
            "seconds": round(seconds, 1),
            "finished": time_stamp(),
        }
        append_jsonl(self.files.history, line)
        write_json(self.files.state, {"finished": generation, "volume_ratio": volume_ratio})

    def read_seeds(self, generation: int) -> list[Atoms]:
        """``Seeds/POSCARS_{g}`` (several structures, XDATCAR-like) and ``Seeds/seeds_{g}.traj``, as
        MAGUS reads them."""
        frames: list[Atoms] = []
        own = self._own_seeds(generation)
        if own.exists():
            frames.extend(read_frames(own))
        for name, form in (
            (f"POSCARS_{generation}", "vasp-xdatcar"),
            (f"seeds_{generation}.traj", "traj"),
        ):
            file = self.seeds / name
            if file.exists() and file.stat().st_size > 0:
                with readable(file, f"seeds ({form})", InputError, isotope_hint):
                    frames.extend(read(file, index=":", format=form))
        check_structures(frames, f"{self.seeds}: seeds of generation {generation}: ")
        return frames

    def write_seeds(self, generation: int, structures: Sequence[Atoms]) -> None:
        """Keep SSCHA centroids as seeds of ``generation``; those that an earlier one was given are
        left out."""
        earlier = {
            structure_id(atoms)
            for g in range(generation)
            if self._own_seeds(g).exists()
            for atoms in read_frames(self._own_seeds(g))
        }
        new = [atoms for atoms in structures if structure_id(atoms) not in earlier]
        if new:
            write_frames(self._own_seeds(generation), new)
            log.info("%d SSCHA centroids are seeds of generation %d", len(new), generation)
        else:
            remove(self._own_seeds(generation))

    def _own_seeds(self, generation: int) -> Path:
        return self.files.seeds / f"seeds_{generation}.traj"


def best_of(good: Sequence[Atoms], generation: int) -> list[Atoms]:
    """Copies of the best structures of a generation, which say so."""
    best = [copied(atoms) for atoms in select_best(good)]
    for atoms in best:
        atoms.info["best_of"] = generation
    return best


def _as_saved(population: Sequence[Atoms], units: list[Atoms] | None) -> list[Atoms]:
    frames = []
    for atoms in population:
        frame = atoms.copy()
        frame.info = {**atoms.info, "type": "Bulk", "fitness": {}}
        if units is not None:
            frame.info["units"] = units
        frames.append(frame)
    return frames


def write_frames(file: Path, frames: Sequence[Atoms]) -> None:
    """Write structures to a .traj file atomically."""
    with replacing(file) as temporary:
        write(temporary, list(frames), format="traj")
        seal(temporary)


def append_frames(file: Path, frames: Sequence[Atoms]) -> None:
    """Append structures to a .traj file, which may be empty; not atomic."""
    with Trajectory(file, "a") as trajectory:
        for frame in frames:
            trajectory.write(frame)


def read_frames(file: Path) -> list[Atoms]:
    """Structures of a .traj file, without calculators; forces and stress in ``info`` as arrays.
    Raises ``DamagedFile``.

    Machine and disk errors are raised as they are.
    """
    with readable(file, "a trajectory"):
        unsealed(file)
        frames: list[Atoms] = list(read(file, index=":", format="traj"))
    for frame in frames:
        frame.calc = None
        for key in ("forces", "stress", "priNum"):
            if key in frame.info:
                frame.info[key] = np.asarray(frame.info[key])
    return frames


def whole_frames(file: Path) -> list[Atoms] | None:
    """Structures of a .traj file; None when it is not there, or is damaged and now set aside to be
    made anew."""
    return read_whole(file, read_frames)
