"""What a finished run shows in the terminal: a table, plain words, a picture, and where the files
are."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magus_anharmonic.errors import MagusAnharmonicError, printable
from magus_anharmonic.runs.folder import SearchFolder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from magus_anharmonic.ranking.candidate import Candidate
    from magus_anharmonic.report.text import RankingView


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
    """Print what a finished run found: a table and its findings for each composition, picture and
    folder."""
    from magus_anharmonic.ranking.candidate import read_ranking
    from magus_anharmonic.report.figures import slope_chart
    from magus_anharmonic.report.text import hull_sentences, ranking_views, sentences

    ranking = SearchFolder(folder).ranking
    if not ranking.exists():
        return
    rows = read_ranking(ranking)
    views = ranking_views(ranking.name, rows)
    screen = console()
    pictures = []
    for view in views:
        screen.print()
        screen.print(table(view, width=screen.width))
        for line in sentences(view.rows):
            screen.print(f"* {line}", highlight=False)
        name = f"ranking-{view.composition}" if len(views) > 1 else "ranking"
        if any(row.ranked for row in view.rows):
            pictures.append(str(slope_chart(view.rows, folder, name)[1]))
    if hull := hull_sentences(rows):
        screen.print()
        for line in hull:
            screen.print(f"* {line}", highlight=False)
    page = SearchFolder(folder).report
    drawn = f"\nPicture: {', '.join(pictures)}" if pictures else ""
    report = f"\nReport: {page}" if page.is_file() else ""
    screen.print(
        f"{drawn}{report}\nEverything else: {folder.resolve()}", highlight=False, soft_wrap=True
    )


COLUMNS = {
    "rank": 4, "id": 8, "atoms": 5, "space group": 8, "static H": 6, "G": 5, "+-": 3,
    "rank by H": 4, "change": 6, "status": 11,
}  # fmt: skip
"""Of the table on the screen, and how many letters of each are not folded at 80 columns."""


def table(view: RankingView, limit: int = 10, width: int = 120) -> Table:
    """The ranking of one composition for a screen of this ``width``: ranked structures by G, then
    the rest by enthalpy.

    Where nothing is ranked, no G is: an upper bound has no lowest to stand above.
    """
    from rich.table import Table

    from magus_anharmonic.structures import symbol_of

    wide = width > 100
    title = f"{view.title}: ranking by free energy (meV/atom above the lowest)"
    result = Table(title=title, padding=(0, int(wide)), show_edge=wide)
    for name, least in COLUMNS.items():
        head = name if wide else name.replace(" ", "\n", 1)
        text = name in ("id", "space group", "status")
        result.add_column(
            head,
            justify="left" if text else "right",
            overflow="fold",
            min_width=least if width >= 80 else None,
        )
    changes = _changes(view.rows)
    for row in view.rows[:limit]:
        groups = (symbol_of(group) for group in (row.spg_static, row.spg_quantum) if group)
        height = view.gibbs(row)
        open_ = height is None and row.status == "unconverged"
        result.add_row(
            str(row.rank_quantum or "-"),
            row.label,
            str(row.natoms),
            " -> ".join(groups),
            _milli(view.enthalpy(row)),
            "not\nconverged" if open_ else _milli(height),
            "-" if height is None else _milli(view.error(row)),
            str(row.rank_static or "-"),
            changes.get(row.id, "-"),
            view.status(row),
        )
    if view.total > limit:
        result.caption = f"{view.total - limit} more in {view.file}"
    return result


def _milli(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _changes(rows: Sequence[Candidate]) -> dict[str, str]:
    """By id: places gained or lost among the structures that have a free energy of their own."""
    from magus_anharmonic.ranking.candidate import numbered

    compared = numbered([row for row in rows if row.phase_ranked and row.enthalpy is not None])
    gained = {row.id: (row.rank_static or 0) - (row.rank_quantum or 0) for row in compared}
    return {name: f"{places:+d}" if places else "0" for name, places in gained.items()}


def require_free_energy(folder: Path) -> None:
    """Raise ``MagusAnharmonicError`` where SSCHA ran and no structure has a free energy, so that a
    job script sees it."""
    from magus_anharmonic.ranking.candidate import read_ranking
    from magus_anharmonic.sscha.record import WITH_ERROR

    ranking = SearchFolder(folder).ranking
    rows = read_ranking(ranking) if ranking.exists() else []
    failed = [row for row in rows if row.status == "failed"]
    if failed and not any(row.status in WITH_ERROR and row.gibbs is not None for row in rows):
        raise MagusAnharmonicError(
            f"no structure has a free energy; the first of {len(failed)} reasons in {ranking}:"
            f" {failed[0].reason}"
        )
