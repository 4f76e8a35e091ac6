"""Crash-safe files: whole or absent, never half-written."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from magus_anharmonic.errors import DamagedFile, InputError, typed_line
from magus_anharmonic.lock import TEMPORARY as TEMPORARY
from magus_anharmonic.lock import still_ours

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 3
"""Version of the files; raised when files of before cannot be gone on with."""
PHYSICS = 1
"""Version of the numbers: raised when the same input gives another answer (`tests/test_golden.py`
notices); old ones are not reused."""


RENAMED = {
    "decrease": "predicted_decrease",
    "decrease_eV_per_atom": "predicted_decrease_eV_per_atom",
    "far": "burn_in",
    "n_became_best": "n_transformed_best",
    "odds": "probability",
    "odds_inside": "probability_inside",
    "repeats": "supercell_matrix",
    "together": "pooled",
}
"""Names of columns and keys in files of earlier versions, and what they are called now."""


def renamed(stored: Mapping[str, T]) -> dict[str, T]:
    """``stored`` under the names of now, see `RENAMED`."""
    return {RENAMED.get(name, name): value for name, value in stored.items()}


def versions() -> dict[str, int]:
    """`SCHEMA` and `PHYSICS`, for the record of a stored number."""
    return {"schema": SCHEMA, "physics": PHYSICS}


_PLAIN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.+-]{0,58}[A-Za-z0-9_+])?")
_DIGEST = re.compile(r"(^|.*-)[0-9a-f]{12}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
"""What Windows takes for a device."""


def safe_name(*texts: str) -> str:
    """The part of a file's name that stands for any texts: no others have it, also where a file
    system folds case or Unicode.

    At most 64 characters of ``[A-Za-z0-9_.+-]``, never ``..`` or hidden. Plain texts stay as they
    are (``Im-3m``, ``natural``; ``Im-3m-T1u`` for two), others become what is readable of them and
    a digest: ``C2/c`` is ``C2_c-`` and twelve hexadecimal digits.
    """
    joined = "-".join(texts)
    one_way = not any("-" in text for text in texts[1:]) and (
        len(texts) == 1 or not _DIGEST.fullmatch(joined)
    )
    if one_way and _PLAIN.fullmatch(joined) and all(_is_itself(text) for text in texts):
        return joined
    readable = re.sub(r"[^A-Za-z0-9_.+-]+", "_", joined)[:50].strip("._-") or "_"
    return f"{readable}-{digest(json.dumps(texts))}"


def digest(content: str | bytes | Path) -> str:
    """Twelve hexadecimal digits (of SHA-256) that identify a text, bytes, or the content of a
    file."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[
        :12
    ]


def _is_itself(text: str) -> bool:
    """Of all texts that differ in case alone one is: with a capital first (short ones, as of space
    groups), or without any (words, ids)."""
    if not text or ("-" in text and _DIGEST.fullmatch(text)) or _RESERVED.fullmatch(text.lower()):
        return False
    capital = len(text) <= 10 and (len(text) <= 4 or not text.isalpha())
    return text == (text[0].upper() + text[1:].lower() if capital else text.lower())


OF_THE_FILE = {
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EINVAL,
    errno.EOVERFLOW,
    errno.ENAMETOOLONG,
}
"""What the system says about a file that is not there or sends a reader to a place that it does not
have."""


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What the system says to who writes."""


def raise_machine_error(error: BaseException, path: str | Path) -> None:
    """Raise ``error``, met while ``path`` was read, again when it speaks of the machine or the disk
    and not of what the file holds.

    Memory exhausted, too many open files, no right to read, an input/output error: the file may be
    whole, and none is called damaged.
    """
    if isinstance(error, MemoryError) and not _has_room_for(path):
        raise error
    # ASE, NumPy and zipfile raise OSErrors of their own for what a file holds; those of the system
    # have a number.
    if isinstance(error, OSError) and error.errno is not None and error.errno not in OF_THE_FILE:
        error.filename = error.filename or str(path)
        raise error


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
        with temporary.open("rb") as file:
            new = hashlib.file_digest(file, "sha256").hexdigest()
        if _sums(target.parent).get(target.name) != new:
            _note(
                target, None
            )  # a kill between the two leaves a table without a digest, never one with another's
    _note(target, new)


def write_table(path: str | Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV table atomically, row by row; its digest goes into `SUMS`."""
    with (
        replacing_table(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


@contextlib.contextmanager
def reading_table(path: str | Path, shown: str | None = None) -> Iterator[BinaryIO]:
    """A table's bytes; raises ``DamagedFile`` (which calls it ``shown``, None: its path) where they
    are not those of its digest."""
    target = Path(path)
    while True:
        noted = _sums(target.parent).get(target.name)
        with target.open("rb") as file:
            if noted is None or noted == hashlib.file_digest(file, "sha256").hexdigest():
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


@contextlib.contextmanager
def table_rows(
    path: str | Path, shown: str | None = None, restkey: str | None = None
) -> Iterator[csv.DictReader[str]]:
    """A reader of the rows of a CSV file; raises ``InputError`` that names the file where it is not
    UTF-8 or no table, see `reading_table`.

    shown : what the error calls the file, None: its path. restkey : see ``csv.DictReader``.
    """
    file = Path(path)
    try:
        with (
            reading_table(file, shown) as content,
            io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as handle,
        ):
            rows = csv.DictReader(handle, restkey=restkey)
            if rows.fieldnames:
                rows.fieldnames = [RENAMED.get(name, name) for name in rows.fieldnames]
            yield rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{shown or file}: not readable as a table ({error}); the step that writes it has to"
            " run again"
        ) from None


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_bytes().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    return {line[66:]: line[:64] for line in lines}


def _note(table: Path, digest: str | None) -> None:
    sums = _sums(table.parent)
    if sums.get(table.name) == digest:
        return
    sums.pop(table.name, None)
    if digest is not None:
        sums[table.name] = digest
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
    write_text(path, json.dumps(_with_digest(data), indent=2) + "\n")


def _with_digest(data: Any) -> Any:
    plain = json.loads(json.dumps(data, default=_plain))
    if isinstance(plain, dict):
        plain.pop(DIGEST, None)
        plain[DIGEST] = _digest_of(plain)
    return plain


def _digest_of(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _is_as_written(data: dict[str, Any]) -> bool:
    """Whether the digest, which is taken out, is that of the rest, or none is there."""
    stored = data.pop(DIGEST, None)
    return stored is None or stored == _digest_of(data)


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
        file.write(
            b"".join(json.dumps(_with_digest(record)).encode() + b"\n" for record in records)
        )
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
            record = json.loads(line)
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
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise_machine_error(error, path)
        raise DamagedFile(f"{path}: damaged or not readable ({error})") from None
    if not isinstance(data, dict):
        raise DamagedFile(
            f"{path}: damaged: holds {type(data).__name__} instead of keys and values"
        )
    if not _is_as_written(data):
        raise DamagedFile(f"{path}: damaged: a value was changed since it was written")
    return data


def load_arrays(path: str | Path) -> dict[str, Any]:
    """All arrays of an .npz file of ours; raises ``DamagedFile``, and disk errors as they are.
    Pickles are never loaded."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            damaged = (
                stored.zip.testzip()
            )  # NumPy reads, and zip compares, no more than a changed shape asks for
            if damaged is not None:
                raise ValueError(f"{damaged} was changed since it was written")
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # zip, zlib, NumPy's header and the file system each raise their own
        raise_machine_error(error, path)
        raise DamagedFile(f"{path}: damaged or not readable ({typed_line(error, 120)})") from None


_SEAL = b"\nsha256 of the bytes before: "


def seal(path: str | Path) -> None:
    """Append a digest to a file whose readers take no notice of what follows its content (ASE's
    .traj)."""
    content = Path(path).read_bytes()
    with Path(path).open("ab") as file:
        file.write(_SEAL + hashlib.sha256(content).hexdigest().encode())


def unsealed(path: str | Path) -> bytes:
    """What was sealed; raises ``DamagedFile`` where it is no longer that. A file without a digest
    is taken as it is."""
    content = Path(path).read_bytes()
    before, found, digest = content.rpartition(_SEAL)
    if found and hashlib.sha256(before).hexdigest().encode() != digest:
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


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
