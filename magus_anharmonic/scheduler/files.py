"""Folders as bytes: workers return what they wrote, and only the process that asked writes it where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.files import replacing

Files = Mapping[str, bytes]
"""Name relative to the folder -> content."""

LAST = "result.json"
"""Written after everything else: a run counts as finished when it is there."""


def packed(folder: Path, *, largest: int | None = None) -> dict[str, bytes]:
    """Every plain file below ``folder`` (none when there is no folder), except temporary ones and those above ``largest`` bytes."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.suffix != ".tmp")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if largest is None or path.stat().st_size <= largest}


def changed(before: Files, after: Files) -> dict[str, bytes]:
    """What is new or different in ``after``."""
    return {name: content for name, content in after.items() if before.get(name) != content}


def unpack(files: Files, folder: Path) -> None:
    """Write the files below ``folder``, each whole or not at all; raises ``MagusAnharmonicError`` for a name that leads out of it."""
    root = folder.resolve()
    for name in sorted(files, key=lambda name: (Path(name).name == LAST, name)):
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            raise MagusAnharmonicError(f"{name}: a worker returned a file outside its folder")
        with replacing(target) as temporary:
            temporary.write_bytes(files[name])
