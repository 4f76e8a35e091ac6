"""SSCHA runs as they are stored: what each belongs to, its free energy, where it led.

``free_energies.db`` (ase.db, SQLite): every SSCHA result, so that none is worked out twice. Only
the main process writes."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import DamagedFile, MagusAnharmonicError
from magus_anharmonic.io.digests import digest, renamed, versions
from magus_anharmonic.io.files import (
    raise_machine_error,
    read_json,
    read_whole,
    replacing,
    set_aside,
    write_json,
)
from magus_anharmonic.ranking.matcher import Fingerprint, same, same_phase
from magus_anharmonic.runs.lock import still_ours
from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha.record import OLD_STATES, RANKED, FreeEnergy, WithFreeEnergy
from magus_anharmonic.structures import stripped, structure_id
from magus_anharmonic.units import GPa


@dataclass(frozen=True)
class Key:
    """What a free energy belongs to besides its structure; pressure in GPa, temperature in K."""

    model: str
    pressure: GPa
    temperature: float
    settings_hash: str

    def folder(self, structure: str) -> str:
        """Name of the run's folder below ``sscha/``: structure id and eight digits of this key."""
        text = f"{self.model} {self.pressure:.6f} {self.temperature:.6f} {self.settings_hash}"
        return f"{structure}-{digest(text)[:8]}"


def sscha_hash(settings: SschaSettings, seed: int = 0, earlier: Sequence[float] = ()) -> str:
    """Twelve hex digits over what changes the number: keys of ``sscha``, seed, and the temperatures
    (K) run before."""
    physics = {**settings.identity(), "n_configs_start": settings.ranking_start}
    data = {**physics, **versions(), "seed": seed, "earlier": list(earlier)}
    return digest(data)


@dataclass(frozen=True, kw_only=True)
class Run(WithFreeEnergy):
    """One SSCHA run: ``start`` in, ``centroids`` out (None when it failed), and its free energy.

    ``enthalpy`` : of the start, eV/atom. ``parent`` is the structure whose run led to this one (a
    centroid reduced to its primitive cell, or a saddle point that was followed), ``reduced`` the
    run that took over from this one in the first case, or because it was seen to come to the same
    phase, ``followed`` the one in the second.
    ``budget_spent`` : the budget (force evaluations of a race) where that ended the run, else None.
    ``predicted`` : G of its centroids by the free-energy model that the search moved on then, and
    ``predicted_error`` : what that expected to be wrong by (eV/atom; `certify`).
    ``generation`` : of a search, that last changed the run (None: not part of one), and ``before``
    : what earlier ones left, oldest first.
    """

    structure: str
    key: Key
    start: Atoms
    free_energy: FreeEnergy
    enthalpy: float | None = None
    centroids: Atoms | None = None
    parent: str = ""
    reduced: str = ""
    followed: str = ""
    budget_spent: int | None = None
    predicted: float | None = None
    predicted_error: float | None = None
    generation: int | None = None
    before: tuple[Run, ...] = ()

    @property
    def folder(self) -> str:
        """Name of the folder below ``sscha/``."""
        return self.key.folder(self.structure)

    @property
    def phase(self) -> Atoms:
        """The centroids; ValueError for a run that failed."""
        if self.centroids is None:
            raise ValueError(f"{self.folder}: the run failed and has no centroids")
        return self.centroids

    def as_of(self, generation: int | None) -> Run | None:
        """The run as this generation of a search left it, None before there was one;
        ``generation`` None: as it is."""
        versions = [*self.before, self]
        while generation is not None and versions and (versions[-1].generation or 0) > generation:
            versions.pop()
        return replace(versions[-1], before=tuple(versions[:-1])) if versions else None

    def stored(self) -> dict[str, Any]:
        """Its numbers and words by their names."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _APART}
        energy = {one.name: getattr(self.free_energy, one.name) for one in fields(FreeEnergy)}
        if energy["error_vector"] is not None:
            energy["error_vector"] = np.array(energy["error_vector"])
        return {**own, **energy}

    @classmethod
    def of(
        cls,
        stored: Mapping[str, Any],
        key: Key,
        start: Atoms,
        centroids: Atoms | None,
        before: Sequence[Run] = (),
    ) -> Run:
        """What `stored` gave, also in earlier versions."""
        values = {_OLD.get(name, name): value for name, value in renamed(stored).items()}
        if values.get("error_vector") is not None:
            values["error_vector"] = tuple(np.asarray(values["error_vector"], dtype=float).tolist())
        values["status"] = OLD_STATES.get(values["status"], values["status"])
        own = {one.name for one in fields(cls)} - _APART
        energy = {one.name for one in fields(FreeEnergy)}
        return cls(
            key=key,
            start=stripped(start),
            centroids=centroids,
            before=tuple(before),
            free_energy=FreeEnergy(**{name: values[name] for name in energy & values.keys()}),
            **{name: values[name] for name in own & values.keys()},
        )


_APART = {"key", "start", "free_energy", "centroids", "before"}
"""Fields of a run that are stored beside its numbers and words."""
_OLD = {
    "spg_static": "space_group_start",
    "spg_quantum": "space_group",
    "n_supercell": "n_atoms_supercell",
}


log = logging.getLogger(__name__)

RECORD = "record.json"
"""In the folder of a run: what the database holds of it."""
NO_DAMAGE = (
    "SQLITE_FULL",
    "SQLITE_IOERR",
    "SQLITE_READONLY",
    "SQLITE_CANTOPEN",
    "SQLITE_BUSY",
    "SQLITE_LOCKED",
    "SQLITE_NOMEM",
)
"""What SQLite calls errors of the disk or the machine, not of the file: an unfinished change
cannot be taken back on a full disk, say."""

READ_TIMEOUT = 2.0
"""Seconds that a reader waits for the process that writes: one record takes milliseconds."""

PREFIX = "id-"
"""ase.db refuses strings that read as numbers, and some hashes do (``1234e5678901``)."""


QUERIED = ("enthalpy", "gibbs", "gibbs_error")
"""For `ase db` queries, where they are known; ase.db has a ``volume`` of its own, so what is read
back is elsewhere."""


class FreeEnergyStore:
    """All records of one run folder, in memory and on disk.

    ``generation`` : of a search, whose ranking this is. When it is done again, as its files were
    damaged, what later ones found and changed is not seen: it would change the estimates, and with
    them the search. None: everything is seen.
    """

    def __init__(self, path: str | Path, generation: int | None = None) -> None:
        self.path, self.generation = Path(path), generation
        self._records: dict[tuple[str, Key], Run] = {}
        self._rows: dict[tuple[str, Key], int] = {}
        self._prints: dict[tuple[str, str], Fingerprint] = {}
        self._by_centroids: dict[tuple[str, Key], str] = {}
        try:
            if self.path.exists() and not self.path.stat().st_size:
                raise DamagedFile("it is empty")
            rows = list(_connect(self.path).select()) if self.path.exists() else []
            found = [(_from_row(row), row.id) for row in rows]
        except Exception as error:  # SQLite, JSON and ASE each have their own for a damaged file
            if isinstance(error, sqlite3.Error) and getattr(
                error, "sqlite_errorname", ""
            ).startswith(NO_DAMAGE):
                raise MagusAnharmonicError(
                    f"{self.path}: cannot be read ({error}); free space or mend the folder, then"
                    " go on"
                ) from None
            raise_machine_error(error, self.path)
            set_aside(
                self.path,
                f"{type(error).__name__}: {error}; free energies are taken from the folders of the"
                " runs again",
            )
            found = []
        for record, row_id in found:
            self._rows[record.structure, record.key] = row_id
            self._remember(record.as_of(generation))
        self._take_back()

    def _take_back(self) -> None:
        """Put what the folders of the runs hold and the database does not (lost, cut, changed) into
        it again."""
        lost = []
        for file in sorted(self.path.parent.glob(f"sscha/*/{RECORD}")):
            record = read_whole(file, _read_record)
            if record is not None and (record.structure, record.key) not in self._rows:
                lost.append(record)
        for record in lost:
            self._write(record)
            self._remember(record.as_of(self.generation))
        if lost:
            log.warning(
                "%s: %d free energies were missing; they are taken from the folders of their runs",
                self.path,
                len(lost),
            )

    def __len__(self) -> int:
        return len(self._records)

    def runs(self, key: Key | None = None) -> Iterator[Run]:
        """All records, or those of one model, pressure, temperature and settings, oldest first."""
        return (record for record in self._records.values() if key is None or record.key == key)

    def put(self, record: Run) -> None:
        """Add the record, or replace the one of the same structure and key; on disk when this
        returns."""
        if self.generation is not None:
            known = self.get(record.structure, record.key)
            before = () if known is None else known.before
            if known is not None and known.generation != self.generation:
                before = (*before, replace(known, before=()))
            record = replace(record, generation=self.generation, before=before)
        self._write(record)
        self._remember(record)

    def _write(self, record: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        identity = (record.structure, record.key)
        pairs, data = _to_row(record)
        atoms = stripped(record.start)
        try:
            if identity in self._rows:
                with still_ours(self.path):
                    gone = [name for name in QUERIED if name not in pairs]
                    _connect(self.path).update(
                        self._rows[identity], atoms=atoms, delete_keys=gone, data=data, **pairs
                    )
            elif self.path.exists():
                with still_ours(self.path):
                    self._rows[identity] = _connect(self.path).write(
                        atoms, key_value_pairs=pairs, data=data
                    )
            else:
                # ASE makes one table after the other: cut short, as by a full disk, that is a file
                # which nobody can read
                with replacing(self.path) as temporary:
                    self._rows[identity] = _connect(temporary).write(
                        atoms, key_value_pairs=pairs, data=data
                    )
            write_json(
                self.path.parent / "sscha" / record.folder / RECORD,
                {"pairs": pairs, "data": data, "start": atoms.todict()},
            )
        except (sqlite3.Error, OSError) as error:  # a full disk, a folder that became read-only
            raise MagusAnharmonicError(
                f"{self.path}: cannot be written ({error}); free space or mend the folder, then"
                " go on"
            ) from None

    def _remember(self, record: Run | None) -> None:
        if record is None:
            return
        self._records[record.structure, record.key] = record
        if record.centroids is not None:
            self._by_centroids[structure_id(record.centroids), record.key] = record.structure

    def get(self, structure: str, key: Key) -> Run | None:
        """The record of a run that started from the structure with this id."""
        return self._records.get((structure, key))

    def find(
        self, atoms: Atoms, key: Key, enthalpy: float | None, tolerance: float, seed: str = ""
    ) -> Run | None:
        """The record that holds for ``atoms``, or None.

        By its hash (as a start or as a centroid); as a seed, when it still is the phase of the
        centroid of run ``seed``; else by the matcher among the starts with an enthalpy (eV/atom)
        within ``tolerance``.
        """
        name = structure_id(atoms)
        if record := self.get(name, key):
            return record
        if (name, key) in self._by_centroids:
            return self.get(self._by_centroids[name, key], key)
        fingerprint = Fingerprint(atoms)
        origin = self.get(seed, key) if seed else None
        if (
            origin is not None
            and origin.centroids is not None
            and same_phase(fingerprint, self._print(origin, "centroids"))
        ):
            return origin
        for record in self.runs(key):
            if (
                enthalpy is None
                or record.enthalpy is None
                or abs(enthalpy - record.enthalpy) > tolerance
            ):
                continue
            if same(fingerprint, self._print(record, "start")):
                log.info("%s is %s, whose free energy is known", name, record.structure)
                return record
        return None

    def earlier(self, atoms: Atoms, key: Key, seed: str = "") -> Run | None:
        """The newest free energy of the same start by another model, at the same pressure,
        temperature and settings, or None.

        The start is the same by its hash, as a centroid of run ``seed``, or as a phase: the two
        models relax it to other volumes.
        """
        name, fingerprint = structure_id(atoms), Fingerprint(atoms)
        where = (key.pressure, key.temperature, key.settings_hash)
        for record in reversed(list(self._records.values())):
            other = record.key
            if (
                other.model == key.model
                or (other.pressure, other.temperature, other.settings_hash) != where
            ):
                continue
            if record.status not in (*RANKED, "unconverged") or record.gibbs is None:
                continue
            if record.structure in (name, seed) or same_phase(
                fingerprint, self._print(record, "start")
            ):
                return self.final(record)
        return None

    def find_phase(self, atoms: Atoms, key: Key) -> Run | None:
        """A final record whose centroids are the phase ``atoms`` in a primitive cell of the same
        size, or None."""
        fingerprint = Fingerprint(atoms)
        for record in self.runs(key):
            if record.centroids is None or record.reduced or len(record.centroids) != len(atoms):
                continue
            if same_phase(fingerprint, self._print(record, "centroids")):
                return record
        return None

    def final(self, record: Run) -> Run:
        """The run that took over from ``record`` (`Run.reduced`), or ``record`` itself."""
        seen = {record.structure}
        while record.reduced and record.reduced not in seen:
            successor = self.get(record.reduced, record.key)
            if successor is None or successor.gibbs is None:
                break
            seen.add(successor.structure)
            record = successor
        return record

    def _print(self, record: Run, which: str) -> Fingerprint:
        name = (record.folder, which)
        if name not in self._prints:
            start = which == "start"
            self._prints[name] = (
                Fingerprint(record.start) if start else Fingerprint(record.phase, record.tolerance)
            )
        return self._prints[name]


def read_records(path: str | Path) -> list[Run]:
    """All records of a database that another process may be writing: nothing is written, renamed or
    long waited for.

    Raises ``MagusAnharmonicError`` that says why it cannot be read now.
    """
    file = Path(path)
    database = _connect(file)
    database._connect = lambda: sqlite3.connect(
        f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=READ_TIMEOUT
    )
    try:
        with database:
            return [_from_row(row) for row in database.select()]
    except Exception as error:  # SQLite, JSON and ASE each have their own for a damaged file
        raise MagusAnharmonicError(
            f"{file.name}: cannot be read now ({type(error).__name__}: {error})"
        ) from None


def _connect(path: Path) -> Any:
    import ase.db

    # A lock file left by a killed process would block the next start for ever; one process writes.
    return ase.db.connect(str(path), type="db", use_lock_file=False)


def _to_row(record: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    pairs = {
        "structure": PREFIX + record.structure,
        "model": PREFIX + record.key.model,
        "settings_hash": PREFIX + record.key.settings_hash,
        "pressure_GPa": record.key.pressure,
        "temperature_K": record.key.temperature,
        "status": record.status,
    }
    values = record.stored()
    pairs |= {name: values[name] for name in QUERIED if values[name] is not None}
    centroids = record.centroids
    before = [
        dict(zip(("pairs", "data"), _to_row(earlier), strict=True)) for earlier in record.before
    ]
    data = {
        "values": values,
        "centroids": None if centroids is None else stripped(centroids).todict(),
        "before": before,
    }
    data["digest"] = _digest(pairs, data, stripped(record.start))
    return pairs, data


def _digest(pairs: Mapping[str, Any], data: Mapping[str, Any], start: Atoms) -> str:
    shown = [
        dict(sorted(pairs.items())),
        data["values"],
        data["centroids"],
        start.todict(),
        *data.get("before", ()),
    ]
    return digest(shown, length=16)


def _read_record(path: Path) -> Run:
    """What `FreeEnergyStore.put` left in the folder of a run; raises ``DamagedFile``."""
    content = read_json(path)
    try:
        return _record(content["pairs"], content["data"], _atoms(content["start"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{path}: not the record of a free energy ({error})") from None


def _atoms(stored: Mapping[str, Any]) -> Atoms:
    """Of `Atoms.todict`, from JSON too: ASE takes arrays such as masses only as such."""
    return Atoms.fromdict({name: np.asarray(value) for name, value in stored.items()})


def _from_row(row: Any) -> Run:
    pairs, data, start = row.key_value_pairs, row.data, stripped(row.toatoms())
    if data.get("digest", "") != _digest(pairs, data, start):
        raise DamagedFile(f"the record of {pairs.get('structure')} was changed")
    return _record(pairs, data, start)


def _record(pairs: Mapping[str, Any], data: Mapping[str, Any], start: Atoms) -> Run:
    key = Key(
        pairs["model"].removeprefix(PREFIX),
        float(pairs["pressure_GPa"]),
        float(pairs["temperature_K"]),
        pairs["settings_hash"].removeprefix(PREFIX),
    )
    centroids = data["centroids"]
    before = [_record(old["pairs"], old["data"], start) for old in data.get("before", ())]
    found = None if centroids is None else _atoms(centroids)
    return Run.of(data["values"], key, start, found, before)
