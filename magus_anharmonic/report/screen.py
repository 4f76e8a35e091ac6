"""What a finished run shows in the terminal: a table, plain words, a picture, and where the files
are."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magus_anharmonic.errors import MagusAnharmonicError, printable

if TYPE_CHECKING:
    from rich.console import Console


def console(width_in_files: int = 120, *, stderr: bool = False) -> Console:
    """Where tables and sentences go; brackets and colons in names of files and phases are text
    there, not markup or emoji.

    What comes from files of others (labels, names of isotopes) cannot control the terminal.
    """
    from rich.console import Console
    from rich.segment import Segment
    from rich.table import Table

    class Screen(Console):
        """Shows control characters instead of sending them (rich's own are marked as such), and
        folds what a column of a table has no room for, instead of cutting it."""

        def print(self, *objects: Any, **options: Any) -> None:
            for column in (c for one in objects if isinstance(one, Table) for c in one.columns):
                column.overflow, column.no_wrap = "fold", False
            super().print(*objects, **options)

        def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
            for segment in super().render(*args, **kwargs):
                yield (
                    segment if segment.control else Segment(printable(segment.text), segment.style)
                )

    if stderr:
        return Screen(stderr=True, markup=False, emoji=False)
    return Screen(width=None if sys.stdout.isatty() else width_in_files, markup=False, emoji=False)


def show_ranking(folder: Path) -> None:
    """Print what a finished run found: a table and plain words for each composition, picture and
    folder."""
    from magus_anharmonic.ranking.candidate import by_composition, read_ranking
    from magus_anharmonic.report.summary import hull_sentences, picture, sentences, table

    ranking = folder / "ranking.csv"
    if not ranking.exists():
        return
    rows = read_ranking(ranking)
    blocks = by_composition(rows)
    screen = console()
    pictures = []
    for block in blocks or [rows]:
        several = len(blocks) > 1
        named = {"title": f"{block[0].composition}: ranking by free energy"} if several else {}
        screen.print()
        screen.print(table(block, width=screen.width, **named))
        for line in sentences(block):
            screen.print(f"* {line}", highlight=False)
        pictures.append(
            picture(
                block,
                folder / (f"ranking-{block[0].composition}.png" if several else "ranking.png"),
            )
        )
    if hull := hull_sentences(rows):
        screen.print()
        for line in hull:
            screen.print(f"* {line}", highlight=False)
    page = folder / "report.html"
    report = f"\nReport: {page}" if page.is_file() else ""
    drawn = ", ".join(map(str, pictures))
    screen.print(
        f"\nPicture: {drawn}{report}\nEverything else: {folder.resolve()}",
        highlight=False,
        soft_wrap=True,
    )


def require_free_energy(folder: Path) -> None:
    """Raise ``MagusAnharmonicError`` where SSCHA ran and no structure has a free energy, so that a
    job script sees it."""
    from magus_anharmonic.ranking.candidate import read_ranking
    from magus_anharmonic.sscha.record import WITH_ERROR

    ranking = folder / "ranking.csv"
    rows = read_ranking(ranking) if ranking.exists() else []
    failed = [row for row in rows if row.status == "failed"]
    if failed and not any(row.status in WITH_ERROR and row.gibbs is not None for row in rows):
        raise MagusAnharmonicError(
            f"no structure has a free energy; the first of {len(failed)} reasons in {ranking}:"
            f" {failed[0].reason}"
        )
