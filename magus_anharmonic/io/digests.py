"""What content is called: digests, names of files, versions of what is stored, and JSON, which
digests of data are taken over."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

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
    "hessian_lowest": "hessian_deciding",
    "hessian_lowest_cm1": "hessian_deciding_cm1",
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


def time_stamp() -> str:
    """The time now, to the second, as records and locks have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _any_plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def to_json(data: Any, *, indent: int | None = None, ordered: bool = False) -> str:
    """``data`` as JSON (NumPy scalars, arrays and paths allowed), ``ordered``: by its keys."""
    return json.dumps(data, indent=indent, sort_keys=ordered, default=_plain)


def finite(data: Any) -> Any:
    """``data`` with ``None`` for numbers that are not finite: JSON knows none."""
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def from_json(text: str | bytes) -> Any:
    """Inverse of `to_json`; raises ValueError and RecursionError."""
    return json.loads(text)


def as_stored(data: Any) -> Any:
    """``data`` as it comes back from a JSON file; what JSON does not know, such as a date, as
    text."""
    return json.loads(json.dumps(data, default=_any_plain))


def digest(*parts: Any, length: int | None = 12) -> str:
    """``length`` hexadecimal digits (None: all 64) of SHA-256 over ``parts`` one after the other.

    Texts, bytes and arrays count as they are, of a `Path` or an open file the content, anything
    else as JSON ordered by its keys.
    """
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                hashlib.file_digest(file, lambda: found)
        elif hasattr(part, "readinto"):
            hashlib.file_digest(part, lambda: found)
        elif isinstance(part, bytes):
            found.update(part)
        elif isinstance(part, str):
            found.update(part.encode())
        elif hasattr(part, "tobytes"):
            found.update(part.tobytes())
        else:
            found.update(json.dumps(part, sort_keys=True, default=_any_plain).encode())
    return found.hexdigest()[:length]


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
    return f"{readable}-{digest(texts)}"


def _is_itself(text: str) -> bool:
    """Of all texts that differ in case alone one is: with a capital first (short ones, as of space
    groups), or without any (words, ids)."""
    if not text or ("-" in text and _DIGEST.fullmatch(text)) or _RESERVED.fullmatch(text.lower()):
        return False
    capital = len(text) <= 10 and (len(text) <= 4 or not text.isalpha())
    return text == (text[0].upper() + text[1:].lower() if capital else text.lower())
