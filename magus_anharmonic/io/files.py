"""Crash-safe files: whole or absent, never half-written."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from magus_anharmonic.errors import (
    DamagedFile,
    InputError,
    MagusAnharmonicError,
    is_machine_error,
    is_out_of_memory,
    one_line,
    typed_line,
)
from magus_anharmonic.io.digests import digest, from_json, renamed, to_json
from magus_anharmonic.runs.lock import TEMPORARY as TEMPORARY
from magus_anharmonic.runs.lock import still_ours

log = logging.getLogger(__name__)

T = TypeVar("T")

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What the system says to who writes."""


def raise_machine_error(error: BaseException, path: str | Path) -> None:
    """Raise ``error``, met while ``path`` was read, again when it speaks of the machine or the disk
    and not of what the file holds.

    Memory exhausted, too many open files, no right to read, an input/output error: the file may be
    whole, and none is called damaged.
    """
    if is_out_of_memory(error):
        # torch has errors of its own for it; memory of a GPU is not asked for by a damaged file
        if isinstance(error, MemoryError) and not _has_room_for(path):
            raise error
        if not isinstance(error, MemoryError) and (
            type(error).__name__ == "OutOfMemoryError" or not _has_room_for(path)
        ):
            raise MemoryError(one_line(error, 200)) from None
    elif is_machine_error(error):
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise error


@contextlib.contextmanager
def readable(
    path: str | Path,
    what: str = "",
    kind: type[InputError] = DamagedFile,
    hint: Callable[[BaseException], str] | None = None,
) -> Iterator[None]:
    """The rule for every file that cannot be read: what goes wrong within, while ``path`` is read
    as ``what``, is an error of the ``kind`` that names the file, with a ``hint`` what to do.

    Our own errors are raised as they are, and so are those of the machine, see
    `raise_machine_error`: the file may be whole.
    """
    try:
        yield
    except MagusAnharmonicError:
        raise
    except Exception as error:  # each library raises its own for what it stumbles over
        raise_machine_error(error, path)
        if isinstance(error, FileNotFoundError) and not Path(path).exists():
            raise kind(f"{path}: no such file") from None
        as_what = f" as {what}" if what else ""
        why = f"{typed_line(error, 160)}{hint(error) if hint else ''}"
        raise kind(f"{path}: damaged or not readable{as_what} ({why})") from None


def _has_room_for(path: str | Path) -> bool:
    # A damaged file may ask for any number of bytes, a whole one for little more than its size,
    # unpacked.
    try:
        bytearray(16 * Path(path).stat().st_size + (1 << 24))
    except (MemoryError, OSError):
        return False
    return True


@contextlib.contextmanager
def writing(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """Give OS errors met within the name of the file that is written: a full disk is told without
    one."""
    try:
        yield
    except OSError as error:
        nameless = (
            error.filename is None
            or error.errno in NO_ROOM
            or str(error.filename) == str(temporary)
        )
        if error.errno is not None and nameless:
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it onto
    ``path``.

    Raises whatever the body raises, and then leaves ``path`` as it was; so does ``LostLock`` of
    this process's folder.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}-{uuid.uuid4().hex[:8]}{target.suffix}{TEMPORARY}")
    with writing(target, temporary):
        # Whoever may read it is for the umask to say.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            with still_ours(target):
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


SUMS = ".sha256sums"
"""Digests of the tables of a folder, as ``sha256sum`` has them; a table without a line there (a
user's, an older one) is taken as it is."""


@contextlib.contextmanager
def replacing_table(path: str | Path) -> Iterator[Path]:
    """`replacing` for a table whose numbers are read back: its digest goes into `SUMS`."""
    target = Path(path)
    with replacing(target) as temporary:
        yield temporary
        new = digest(temporary, length=None)
        if _sums(target.parent).get(target.name) != new:
            _note(
                target, None
            )  # a kill between the two leaves a table without a digest, never one with another's
    _note(target, new)


@contextlib.contextmanager
def reading_table(path: str | Path, shown: str | None = None) -> Iterator[BinaryIO]:
    """A table's bytes; raises ``DamagedFile`` (which calls it ``shown``, None: its path) where they
    are not those of its digest."""
    target = Path(path)
    while True:
        noted = _sums(target.parent).get(target.name)
        with target.open("rb") as file:
            if noted is None or noted == digest(file, length=None):
                file.seek(0)
                yield file
                return
        # A process that writes it at this moment changes the digest too.
        if _sums(target.parent).get(target.name) == noted:
            raise DamagedFile(
                f"{shown or target}: changed since it was written; bring it back, or have it made"
                f" anew (of a campaign: --only its step), or remove its line in {SUMS} beside it to"
                " take it as it is"
            )


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_bytes().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    return {line[66:]: line[:64] for line in lines}


def _note(table: Path, found: str | None) -> None:
    sums = _sums(table.parent)
    if sums.get(table.name) == found:
        return
    sums.pop(table.name, None)
    if found is not None:
        sums[table.name] = found
    if sums:
        write_text(
            table.parent / SUMS,
            "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())),
        )
    else:
        remove(table.parent / SUMS)


def remove(path: str | Path) -> None:
    """Remove a file or a folder of a run, if it is there; raises ``LostLock`` when the run is
    another process's."""
    target = Path(path)
    with still_ours(target):
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
    _note(target, None)


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


DIGEST = "sha256"
"""Key of a JSON object of ours that tells whether its other values are those that were written; one
without it is taken as it is."""


def write_json(path: str | Path, data: Any) -> None:
    """Write ``data`` as indented JSON atomically (NumPy scalars and arrays allowed), an object with
    its `DIGEST`."""
    write_text(path, to_json(_with_digest(data), indent=2) + "\n")


def _with_digest(data: Any) -> Any:
    plain = from_json(to_json(data))
    if isinstance(plain, dict):
        plain.pop(DIGEST, None)
        plain[DIGEST] = digest(plain, length=16)
    return plain


def _is_as_written(data: dict[str, Any]) -> bool:
    """Whether the digest, which is taken out, is that of the rest, or none is there."""
    stored = data.pop(DIGEST, None)
    return stored is None or stored == digest(data, length=16)


def append_jsonl(path: str | Path, *records: dict[str, Any]) -> None:
    """Append records, each as one line, and flush them to disk.

    A line that a killed process cut short is closed first, so that it spoils no later record.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with still_ours(target), writing(target), target.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(b"".join(to_json(_with_digest(record)).encode() + b"\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(
    path: str | Path, required: Iterable[str] | Mapping[str, Any] = ()
) -> list[dict[str, Any]]:
    """Read all whole records of a JSON-lines file that have the ``required`` keys (a mapping: with
    values of these types; no inf, nan).

    A last line that a kill cut short is left out without a word, any other line that is no such
    record, or changed, with a warning.
    """
    target = Path(path)
    if not target.exists():
        return []
    records, wanted = (
        [],
        dict(required) if isinstance(required, Mapping) else dict.fromkeys(required, object),
    )
    lines = target.read_bytes().decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = from_json(line)
        except (ValueError, RecursionError):
            record = None
        if (
            isinstance(record, dict)
            and _is_as_written(record)
            and all(key in record and _is(record[key], kind) for key, kind in wanted.items())
        ):
            records.append(record)
        elif line.strip() and number < len(lines):
            log.warning("%s, line %d: damaged, left out", target, number)
    return records


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (
        kind is object or not isinstance(value, float) or math.isfinite(value)
    )


def read_json(path: str | Path) -> dict[str, Any]:
    """The mapping in a JSON file of ours; raises ``DamagedFile`` when it holds none, and disk
    errors as they are."""
    with readable(path):
        data = from_json(Path(path).read_bytes())
        if not isinstance(data, dict):
            raise DamagedFile(
                f"{path}: damaged: holds {type(data).__name__} instead of keys and values"
            )
        if not _is_as_written(data):
            raise DamagedFile(f"{path}: damaged: a value was changed since it was written")
        return data


def read_as(kind: type[T], path: str | Path, mend: str = "", *, whole: bool = False) -> T:
    """A JSON file as an object of the ``kind`` that wrote it, a dataclass or a model of pydantic.

    Raises ``DamagedFile`` that names file and field and says how to ``mend`` it; ``whole``: also
    where a field is missing that has a default, but for fields that earlier versions did not write
    (``later`` in their metadata).
    """
    from pydantic import ValidationError

    then = f"; {mend}" if mend else ""
    try:
        data = renamed(read_json(path))
        known = getattr(kind, "__dataclass_fields__", {}) if whole else {}
        always = {name for name, one in known.items() if not one.metadata.get("later")}
        missing = always - data.keys()
        if missing:
            raise DamagedFile(f"{path}: damaged: no {', '.join(sorted(missing))}")
        # as JSON, so that lists are tuples also where a kind is strict
        return _adapter(kind).validate_json(to_json(data))
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise DamagedFile(f"{path}: damaged: {one_line(why, 200)}{then}") from None
    except DamagedFile as error:
        raise DamagedFile(f"{error}{then}") from None


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def read_json_if_there(path: str | Path) -> dict[str, Any]:
    """As `read_json`; a file that is not there is empty."""
    return read_json(path) if Path(path).is_file() else {}


def write_arrays(path: str | Path, *, compressed: bool = False, **arrays: Any) -> None:
    """Write an .npz file atomically. Not ``compressed``: random numbers shrink by a few per cent,
    and it would take longer than all the algebra."""
    import numpy as np

    with replacing(path) as temporary, temporary.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)


def load_arrays(path: str | Path) -> dict[str, Any]:
    """All arrays of an .npz file of ours; raises ``DamagedFile``, and disk errors as they are.
    Pickles are never loaded."""
    import numpy as np

    with readable(path), np.load(path, allow_pickle=False) as stored:
        # NumPy reads, and zip compares, no more than a changed shape asks for
        damaged = stored.zip.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} was changed since it was written")
        return {name: stored[name] for name in stored.files}


_SEAL = b"\nsha256 of the bytes before: "


def seal(path: str | Path) -> None:
    """Append a digest to a file whose readers take no notice of what follows its content (ASE's
    .traj)."""
    content = Path(path).read_bytes()
    with Path(path).open("ab") as file:
        file.write(_SEAL + digest(content, length=None).encode())


def unsealed(path: str | Path) -> bytes:
    """What was sealed; raises ``DamagedFile`` where it is no longer that. A file without a digest
    is taken as it is."""
    content = Path(path).read_bytes()
    before, found, stored = content.rpartition(_SEAL)
    if found and digest(before, length=None).encode() != stored:
        raise DamagedFile(f"{path}: damaged: it was changed since it was written")
    return before if found else content


def set_aside(path: str | Path, why: str) -> Path:
    """Rename a damaged file to ``NAME.damaged`` (``.damaged2``, ...) with a warning, so that it is
    made anew; returns its new name."""
    target = Path(path)
    number, kept = 1, target.with_name(f"{target.name}.damaged")
    while kept.exists():
        number += 1
        kept = target.with_name(f"{target.name}.damaged{number}")
    with still_ours(target):
        target.replace(kept)
    log.warning(
        "%s is damaged (%s); it is kept as %s and made anew",
        target,
        " ".join(why.split())[:200],
        kept.name,
    )
    return kept


def read_whole(path: str | Path, reader: Callable[[Path], T]) -> T | None:
    """What ``reader`` makes of a file; None when it is not there, or is damaged and set aside to be
    made anew."""
    file = Path(path)
    if not file.is_file():
        return None
    try:
        return reader(file)
    except DamagedFile as error:
        set_aside(file, str(error))
        return None
