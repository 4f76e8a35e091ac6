"""Writes docs/columns.md from the fields of the records, so that the page cannot drift from the
code: ``python docs/make_columns.py``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from magus_anharmonic.io.tables import columns_of
from magus_anharmonic.phase_diagram.points import GibbsPoint
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.sscha.record import INFO_KEYS, FreeEnergy

PAGE = Path(__file__).with_name("columns.md")

TABLES: list[tuple[str, str, type]] = [
    (
        "`ranking.csv`, `ranking_<T>K.csv`, `ranking-<P>GPa.csv`",
        "A row is a distinct structure (`ranking.candidate.Candidate`). From `status` to `p_stable`"
        " it is its free energy (`sscha.record.FreeEnergy`), as the SSCHA run made it or the"
        " ranking pooled or estimated it.",
        Candidate,
    ),
    (
        "`gibbs.csv`",
        "A row is one free energy of a phase diagram (`phase_diagram.points.GibbsPoint`).",
        GibbsPoint,
    ),
]


def section(title: str, text: str, record: type) -> str:
    """One heading with its table."""
    lines = [f"## {title}", "", text, "", "| column | unit | meaning | equation | made by |"]
    lines.append("|---|---|---|---|---|")
    for one in columns_of(record):
        cells = (
            f"`{one.name}`",
            one.unit,
            one.meaning,
            f"`{one.equation}`" if one.equation else "",
            f"`{one.origin}`" if one.origin else "",
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def render() -> str:
    """The whole page."""
    stored = ", ".join(f"`{one.name}`" for one in dataclasses.fields(FreeEnergy))
    keys = ", ".join(f"`{key}`" for key in INFO_KEYS.values())
    head = (
        "# Columns\n\n<!-- Made by docs/make_columns.py from the fields of the records. -->"
        "\n\nAn empty cell: there is no such number. Tables of earlier versions are read by"
        " the names that they have.\n"
    )
    tail = f"""## The same numbers elsewhere

* `free_energies.db` and `record.json` in the folder of a run hold a run's {stored}.
* `Atoms.info` of a ranked structure and the frames of `quantum.traj` have {keys}, and \
`gibbs_model`, the model that they belong to.
* The report shows the columns of `ranking.csv` below each ranking.
* `results.json` has the rows of all temperatures (`pandas.DataFrame(data["rows"])`), each with \
these columns, and `structure` (static, relaxed) and `centroids` (SSCHA) for \
`pymatgen.core.Structure.from_dict`; `columns` has unit, meaning and equation of each.
* `relaxed.extxyz` (of `rank`) has every structure as it was relaxed, merged and failed ones too, \
with energy, forces and stress of the model. Its `info` is that of the input and the columns of \
the row that stands for it; what is called as a column keeps its own value as `<key>_given`."""
    return "\n\n".join([head.rstrip(), *(section(*table) for table in TABLES), tail]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
