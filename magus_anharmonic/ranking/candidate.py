"""One structure of a ranking, with everything the table, the fitness and the report say about it,
and the files that a ranking leaves for people and for other programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.spacegroup import Spacegroup

from magus_anharmonic.errors import InputError
from magus_anharmonic.hull import reduced_formula
from magus_anharmonic.io.digests import as_stored
from magus_anharmonic.io.files import remove, replacing, write_json
from magus_anharmonic.io.tables import column, columns_of, read, values, write
from magus_anharmonic.notebook import Described, html_table
from magus_anharmonic.ranking.store import Run
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.sscha.record import INFO_KEYS, FreeEnergy, WithFreeEnergy
from magus_anharmonic.structures import as_pymatgen, formula, stripped
from magus_anharmonic.units import ev_to_mev

_TABLE = "ranking.candidate.numbered"
_RANK = "ranking.rank.Ranking"
_DIFFERENCE = "ranking.uncertainty.with_probabilities"
_HULL = "ranking.fitness.with_heights"
_POOLED = "ranking.phases.merge_duplicates"
_PREDICTED = "ranking.certify.Predictor"


@dataclass(frozen=True, kw_only=True, repr=False)
class Candidate(Described, WithFreeEnergy):
    """A distinct structure at one pressure and temperature: a row of ``ranking.csv``, whose columns
    are the fields that `column` makes here and in `FreeEnergy`.

    ``atoms`` is the statically relaxed structure, ``members`` the positions in the population of
    all structures that were found to be this one, ``run`` the SSCHA run that ``free_energy`` is of
    (None: an estimate, or nothing). ``pooled`` : folders of the runs of which G is the mean, and
    their weights (`phases`; empty: of one run). A candidate that was read from a table has none of
    them.
    """

    id: str = column("identity of the static structure", default="", needed=True)
    name: str = column("file that the structure came from, and its number there", default="")
    merged: str = column("names of further structures that are this one", default="")
    formula: str = column("formula, metals first; deuterium is D", default="", needed=True)
    natoms: int = column("atoms of the static structure", default=0, needed=True)
    pressure: float = column("pressure", "GPa", default=0.0, digits="g", needed=True)
    temperature: float = column("temperature", "K", default=0.0, digits="g", needed=True)
    spg_static: str = column(
        "space group of the static structure", default="", needed=True, origin=_RANK
    )
    enthalpy: float | None = column(
        "static enthalpy", "eV/atom", equation="(E + P V) / N", origin=_RANK, needed=True
    )
    free_energy: FreeEnergy = FreeEnergy()
    model: str = column("identity of the model", default="")
    rank_static: int | None = column("rank by enthalpy in the composition", origin=_TABLE)
    rank_quantum: int | None = column("rank by gibbs among distinct phases", origin=_TABLE)
    same_as: str = column(
        "id of the candidate that stands for the quantum phase in which this one ended too",
        default="",
        origin="ranking.phases.label_phases",
    )
    n_merged: int = column("further structures of the population that are this one", default=0)
    seed_of: str = column(
        "run whose centroids the structure came from as a seed", default="", origin=_RANK
    )
    sscha_folder: str = column("folder of the run below `sscha/`", default="")
    difference: float | None = column(
        "gibbs minus that of the lowest phase of the composition", "eV/atom", origin=_DIFFERENCE
    )
    difference_sampling_error: float | None = column(
        "its standard error by sampling; what runs without surrogate share counts once",
        "eV/atom",
        equation="sqrt(e1^2 + e2^2 - 2 cov)",
        origin="ranking.uncertainty.difference_error",
    )
    difference_finite_size_error: float | None = column(
        "its error by finite size: half the difference of the two terms f, and the spreads s"
        " (`duplicate_spread`)",
        "eV/atom",
        equation="sqrt((f1 - f2)^2 / 4 + s1^2 + s2^2)",
        origin=_DIFFERENCE,
    )
    difference_model_error: float | None = column(
        "its error by the model, less what both phases share: error vectors v, errors of their own"
        " m (measured, or without a vector), measured corrections c",
        "eV/atom",
        equation="sqrt(norm(v1 - v2)^2 + m1^2 + m2^2 + (c1 - c2)^2)",
        origin="ranking.uncertainty.ModelErrors.of_difference",
    )
    p_lowest_sampling: float | None = column(
        "probability to be the lowest, by sampling alone", origin=_DIFFERENCE
    )
    p_lowest_total: float | None = column(
        "probability to be the lowest, with all three errors", origin=_DIFFERENCE
    )
    model_error: float | None = column(
        "expected error of the static energy of the model", "eV/atom", origin=_RANK
    )
    gibbs_predicted: float | None = column(
        "Gibbs free energy by the free-energy model that the search moves on, of the supercell as"
        " it is: to be compared with gibbs_raw of a certified one",
        "eV/atom",
        equation="(F + P V) / N",
        origin=_PREDICTED,
    )
    gibbs_predicted_error: float | None = column(
        "expected error of gibbs_predicted", "eV/atom", origin=_PREDICTED
    )
    predicted_by: str = column("identity of the free-energy model", default="", origin=_PREDICTED)
    parent: str = column(
        "structure whose saddle point was followed to this one",
        default="",
        origin="ranking.stability.with_followers",
    )
    model_correction: float | None = column(
        "G by DFT minus G by the model, from labels of the ensemble", "eV/atom", origin=_DIFFERENCE
    )
    model_correction_error: float | None = column(
        "standard error of model_correction", "eV/atom", origin=_DIFFERENCE
    )
    n_pooled: int | None = column("runs of which gibbs is the weighted mean", origin=_POOLED)
    duplicate_spread: float | None = column(
        "largest distance of gibbs of runs of the phase in other supercells",
        "eV/atom",
        origin=_POOLED,
    )
    enthalpy_above_hull: float | None = column(
        "enthalpy above the hull of all compositions", "eV/atom", origin=_HULL
    )
    gibbs_above_hull: float | None = column(
        "gibbs above the hull of the computed ones", "eV/atom", origin=_HULL
    )
    gibbs_above_hull_error: float | None = column(
        "standard error of gibbs_above_hull by sampling", "eV/atom", origin=_HULL
    )
    p_on_hull_sampling: float | None = column(
        "probability to be on the hull, by sampling alone", origin=_HULL
    )
    p_on_hull_total: float | None = column(
        "probability to be on the hull, with the errors of the model", origin=_HULL
    )
    atoms: Atoms | None = None
    members: tuple[int, ...] = ()
    run: Run | None = None
    pooled: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.atoms is not None and not self.formula:
            object.__setattr__(self, "formula", formula(self.atoms))
            object.__setattr__(self, "natoms", len(self.atoms))

    @property
    def phase_ranked(self) -> bool:
        """True with a free energy that counts and for which no other candidate stands."""
        return self.ranked and not self.same_as

    @property
    def structure(self) -> Atoms:
        """The static structure; ValueError for a candidate that was read from a table."""
        if self.atoms is None:
            raise ValueError(f"{self.id}: its structure is not known")
        return self.atoms

    @property
    def energy(self) -> float | None:
        """By which a structure without free energy of its own is compared, eV/atom: what the
        search moves on, G by the model where that is a free energy, else the enthalpy."""
        return self.enthalpy if self.gibbs_predicted is None else self.gibbs_predicted

    @property
    def spg_quantum(self) -> str:
        """Space group of the centroids."""
        return self.free_energy.space_group

    @property
    def run_id(self) -> str:
        """Structure of the run that the free energy is of; empty where there is none."""
        return "" if self.run is None else self.run.structure

    @property
    def centroids(self) -> Atoms | None:
        """The structure once its ions move."""
        return None if self.run is None else self.run.centroids

    @property
    def label(self) -> str:
        """What it is called in a sentence: its file where it came from one (with the folder where
        files are called alike, as CONTCAR), else the beginning of its id."""
        path = Path(self.name)
        alike = not path.suffix or path.stem.lower() in ("vasprun", "structure", "relaxed")
        return "/".join(path.parts[-2:]) if alike and self.name else path.name or self.id[:8]

    @property
    def composition(self) -> str:
        """The formula without common divisor: one name for all cells of a composition; the formula
        itself where it is none (of a table from elsewhere)."""
        try:
            return reduced_formula(self.formula)
        except InputError:
            return self.formula

    def described(self) -> dict[str, str]:
        shown = dict(zip(RankingTable._HEAD, RankingTable([self])._rows()[0], strict=True))
        at = {"at": f"{self.pressure:g} GPa, {self.temperature:g} K"}
        return {name: value for name, value in (shown | at).items() if value}


class RankingTable(list[Candidate]):
    """Candidates in the order of a table: a list that shows itself as one, also in a notebook."""

    _HEAD = ("rank", "structure", "space group", "G (eV/atom)", "above (meV/atom)", "+-", "status")

    def _rows(self) -> list[tuple[str, ...]]:
        def shown(value: float | None, digits: int) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        return [
            (
                str(one.rank_quantum or "-"),
                f"{one.formula} {one.label}",
                " -> ".join(dict.fromkeys(filter(None, (one.spg_static, one.spg_quantum)))),
                ("below " if one.status == "unconverged" else "") + shown(one.gibbs, 5),
                shown(None if one.difference is None else ev_to_mev(one.difference), 1),
                shown(None if one.gibbs_error is None else ev_to_mev(one.gibbs_error), 1),
                f"same as {one.same_as[:8]}" if one.same_as else one.status,
            )
            for one in self
        ]

    def __repr__(self) -> str:
        rows = [self._HEAD, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (map(str.ljust, row, widths) for row in rows)
        return "\n".join("  ".join(line).rstrip() for line in lines)

    def _repr_html_(self) -> str:
        return html_table(self._HEAD, self._rows())


def by_composition(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """The candidates of each composition: those nearest to the hull first, else by formula."""
    blocks: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        blocks.setdefault(candidate.composition, []).append(candidate)
    return [blocks[name] for name in sorted(blocks, key=lambda name: (_lowest(blocks[name]), name))]


def _lowest(block: Sequence[Candidate]) -> tuple[float, float]:
    gibbs = [c.gibbs_above_hull for c in block if c.ranked and c.gibbs_above_hull is not None]
    static = [c.enthalpy_above_hull for c in block if c.enthalpy_above_hull is not None]
    return min(gibbs, default=math.inf), min(static, default=math.inf)


def numbered(candidates: Sequence[Candidate]) -> RankingTable:
    """Order for the table, composition by composition, ranks filled in.

    Of a composition first the ranked phases, by G; then those that are the same phase as one of
    them; then saddle points, unconverged, estimated and failed ones by G or its estimate, and those
    without one by enthalpy; last what has none. Where nothing is ranked, all by enthalpy: an upper
    bound puts nothing in order. ``rank_static`` counts all candidates of the composition by
    enthalpy, ``rank_quantum`` the phases of the first kind alone: an estimate is never the best.
    """
    return RankingTable(
        candidate for block in by_composition(candidates) for candidate in _numbered_block(block)
    )


def _numbered_block(candidates: Sequence[Candidate]) -> list[Candidate]:
    by_enthalpy = sorted(
        (c for c in candidates if c.enthalpy is not None), key=lambda c: (c.enthalpy, c.id)
    )
    static = {c.id: index for index, c in enumerate(by_enthalpy, start=1)}
    phases = sorted((c for c in candidates if c.phase_ranked), key=lambda c: (c.gibbs, c.id))
    quantum = {c.id: index for index, c in enumerate(phases, start=1)}
    ranked = [
        replace(c, rank_static=static.get(c.id), rank_quantum=quantum.get(c.id)) for c in candidates
    ]
    return sorted(ranked, key=_table_order if any(c.ranked for c in ranked) else _static_order)


def _static_order(candidate: Candidate) -> tuple[bool, float, str]:
    energy = candidate.energy
    return (energy is None, energy or 0.0, candidate.id)


def _table_order(candidate: Candidate) -> tuple[int, float, str]:
    if candidate.ranked:
        return (1 if candidate.same_as else 0, candidate.gibbs or 0.0, candidate.id)
    if candidate.gibbs is not None:
        return (2, candidate.gibbs, candidate.id)
    if candidate.energy is not None:
        return (3, candidate.energy, candidate.id)
    return (4, 0.0, candidate.id)


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
        own = as_stored({key: _on_one_line(value) for key, value in source.info.items()}).items()
        frame.info = {f"{key}_given" if key in taken else key: value for key, value in own} | found
        frames.append(frame)
    with replacing(path) as temporary:
        write(temporary, frames, format="extxyz")


RESULTS = ("energy", "forces", "stress")


def _on_one_line(value: Any) -> Any:
    """Extended XYZ has one line for all of ``info``; a CIF's ``Spacegroup`` is written in many."""
    if isinstance(value, Spacegroup):
        return f"{value.symbol} ({value.no})"
    return " ".join(value.split()) if isinstance(value, str) and "\n" in value else value


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
        found.append(draw_convergence(SearchFolder(run_dir).sscha / c.sscha_folder, title))
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


def info_of(free_energy: FreeEnergy) -> dict[str, Any]:
    """The keys of ``Atoms.info`` that a free energy fills; NaN where there is no number."""
    found = {key: getattr(free_energy, name) for name, key in INFO_KEYS.items()}
    found["gibbs_error"] = None if free_energy.gibbs is None else free_energy.gibbs_error
    return {key: np.nan if value is None else value for key, value in found.items()}
