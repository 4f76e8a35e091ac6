"""``ranking.csv`` and ``quantum.traj``: what a ranking leaves for people and for other programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from magus_anharmonic.io.digests import as_stored
from magus_anharmonic.io.files import remove, replacing, write_json
from magus_anharmonic.io.tables import columns_of, read, values, write
from magus_anharmonic.ranking.candidate import Candidate, RankingTable
from magus_anharmonic.ranking.jobs import info_of
from magus_anharmonic.ranking.run import Run
from magus_anharmonic.structures import as_pymatgen, formula, stripped


def write_ranking(path: str | Path, candidates: Sequence[Candidate]) -> None:
    """Write the table atomically, in the order given."""
    write(Candidate, path, candidates)


def read_ranking(path: str | Path) -> RankingTable:
    """Read ``ranking.csv``; rows in the order of the file. Raises ``InputError`` (file, line,
    column)."""
    return RankingTable(read(Candidate, path))


def write_results(path: str | Path, tables: Iterable[Iterable[Candidate]]) -> None:
    """All rows as JSON with the unit and meaning of each column, for pandas (``rows``), and for
    pymatgen the static structure and the centroids of each (None: not known)."""
    told = {
        one.name: {"unit": one.unit, "meaning": one.meaning, "equation": one.equation}
        for one in columns_of(Candidate)
    }
    rows = [
        {
            **values(row),
            "structure": None if row.atoms is None else as_pymatgen(row.atoms),
            "centroids": None if row.centroids is None else as_pymatgen(row.centroids),
        }
        for table in tables
        for row in table
    ]
    write_json(path, {"columns": told, "rows": rows})


def write_relaxed(
    path: str | Path,
    relaxed: Sequence[Atoms],
    given: Sequence[Atoms],
    candidates: Sequence[Candidate],
) -> None:
    """Every structure as it was relaxed, merged and failed ones too, as extended XYZ with energy,
    forces and stress of the model.

    ``info`` has that of the structure as it was ``given``, and the columns of its row; what would
    stand for both keeps its own under ``<key>_given``.
    """
    from ase.io import write

    rows = {index: row for row in candidates for index in row.members}
    frames = []
    for index, (atoms, source) in enumerate(zip(relaxed, given, strict=True)):
        row = values(rows[index])
        found = {name: value for name, value in row.items() if value not in ("", None)}
        found |= {"name": str(source.info.get("name") or index), "formula": formula(atoms)}
        found["natoms"] = len(atoms)
        if rows[index].enthalpy is not None:
            found["enthalpy_eV_per_atom"] = atoms.info["enthalpy"]
        frame = stripped(atoms)
        results = {name: atoms.info[name] for name in RESULTS if name in atoms.info}
        frame.calc = SinglePointCalculator(frame, **results)
        taken = {*found, *RESULTS} - {"name"}
        own = as_stored(source.info).items()
        frame.info = {f"{key}_given" if key in taken else key: value for key, value in own} | found
        frames.append(frame)
    with replacing(path) as temporary:
        write(temporary, frames, format="extxyz")


RESULTS = ("energy", "forces", "stress")


def draw_best(run_dir: Path, candidates: Sequence[Candidate], n_best: int) -> list[Path]:
    """``convergence.png`` in the run folders of the lowest ``n_best`` phases and of the saddle
    points; those that have a table."""
    from magus_anharmonic.sscha.report import draw_convergence

    best = [
        c
        for c in candidates
        if c.sscha_folder and (c.status == "saddle" or (c.rank_quantum or n_best + 1) <= n_best)
    ]
    found = []
    for c in best:
        title = f"{c.formula}, {c.free_energy.space_group}, {c.pressure:g} GPa, {c.temperature:g} K"
        found.append(draw_convergence(run_dir / "sscha" / c.sscha_folder, title))
    return [path for path in found if path is not None]


def write_quantum(path: str | Path, runs: Iterable[Run]) -> int:
    """Write the centroids of all runs that have a G, lowest first, ``info`` as known; no file
    without any; returns how many.

    ``parent_id`` is the structure whose run led here, ``candidate_id`` the one this run started
    from.
    """
    from ase.io import write

    found = sorted(
        (run for run in runs if run.ranked and run.centroids is not None),
        key=lambda run: (run.key.model, run.key.temperature, run.gibbs),
    )
    if not found:
        remove(path)  # of an earlier stage of the same ranking
        return 0
    with replacing(path) as temporary:
        write(temporary, [_frame(run) for run in found], format="traj")
    return len(found)


def _frame(run: Run) -> Atoms:
    atoms = stripped(run.phase)
    atoms.info = {
        **info_of(run.free_energy),
        "candidate_id": run.structure,
        "parent_id": run.parent or run.structure,
        "gibbs_model": run.key.model,
        "spg_static": run.free_energy.space_group_start,
        "pressure_GPa": run.key.pressure,
        "temperature_K": run.key.temperature,
        "sscha_folder": run.folder,
    }
    return atoms
