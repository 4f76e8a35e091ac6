"""Crash-safe files: whole or absent, never half-written."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from magus_anharmonic.errors import DamagedFile, InputError

log = logging.getLogger(__name__)

T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it onto ``path``.

    Raises whatever the body raises, and then leaves ``path`` as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=f"{target.suffix}.tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def table_rows(path: str | Path, shown: str | None = None, restkey: str | None = None) -> Iterator[csv.DictReader[str]]:
    """A reader of the rows of a CSV file; raises ``InputError`` that names the file where it is not UTF-8 or no table.

    shown : what the error calls the file, None: its path. restkey : see ``csv.DictReader``.
    """
    file = Path(path)
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            yield csv.DictReader(handle, restkey=restkey)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{shown or file}: not readable as a table ({error}); the step that writes it has to run again") from None


def remove_unfinished(folder: str | Path) -> int:
    """Remove the temporary files and folders that killed processes left below ``folder``, whose lock must be held; returns how many."""
    found = [path for pattern in (".*.tmp", ".*.tmp-journal") for path in Path(folder).rglob(pattern)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)


def remove_empty(folder: str | Path) -> bool:
    """Remove ``folder`` if nothing but folders is below it; whether it was."""
    if any(not path.is_dir() or path.is_symlink() for path in Path(folder).rglob("*")):
        return False
    shutil.rmtree(folder)
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write ``data`` as indented JSON atomically (NumPy scalars and arrays allowed)."""
    write_text(path, json.dumps(data, indent=2, default=_plain) + "\n")


def append_jsonl(path: str | Path, record: dict[str, Any]) -> None:
    """Append one record as one line and flush it to disk.

    A line that a killed process cut short is closed first, so that it spoils no later record.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record, default=_plain).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | Path, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Read all whole records of a JSON-lines file that have the ``required`` keys.

    A last line that a kill cut short is left out without a word, any other line that is no such record with a warning.
    """
    target = Path(path)
    if not target.exists():
        return []
    records, wanted = [], set(required)
    lines = target.read_bytes().decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and wanted <= set(record):
            records.append(record)
        elif line.strip() and number < len(lines):
            log.warning("%s, line %d: damaged, left out", target, number)
    return records


def read_json(path: str | Path) -> dict[str, Any]:
    """The mapping in a JSON file of ours; raises ``DamagedFile`` when it holds none."""
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: damaged or not readable ({error})") from None
    if not isinstance(data, dict):
        raise DamagedFile(f"{path}: damaged: holds {type(data).__name__} instead of keys and values")
    return data


def load_arrays(path: str | Path) -> dict[str, Any]:
    """All arrays of an .npz file of ours; raises ``DamagedFile``. Pickled objects are never loaded."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # zip, zlib, NumPy's header and the file system each raise their own
        raise DamagedFile(f"{path}: damaged or not readable ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from None


def set_aside(path: str | Path, why: str) -> Path:
    """Rename a damaged file to ``NAME.damaged`` (``.damaged2``, ...) with a warning, so that it is made anew; returns its new name."""
    target = Path(path)
    number, kept = 1, target.with_name(f"{target.name}.damaged")
    while kept.exists():
        number += 1
        kept = target.with_name(f"{target.name}.damaged{number}")
    target.replace(kept)
    log.warning("%s is damaged (%s); it is kept as %s and made anew", target, " ".join(why.split())[:200], kept.name)
    return kept


def read_whole(path: str | Path, reader: Callable[[Path], T]) -> T | None:
    """What ``reader`` makes of a file; None when it is not there, or is damaged and set aside to be made anew."""
    file = Path(path)
    if not file.is_file():
        return None
    try:
        return reader(file)
    except DamagedFile as error:
        set_aside(file, str(error))
        return None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
