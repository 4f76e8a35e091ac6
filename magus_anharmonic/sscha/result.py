"""The result of an SSCHA run, and the folder of the run: identity, start, populations, progress,
convergence table; reused when the run starts again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import DamagedFile, InputError, NotConverged
from magus_anharmonic.io.digests import as_stored, renamed, safe_name, versions
from magus_anharmonic.io.files import (
    load_arrays,
    read_as,
    read_json,
    read_whole,
    readable,
    write_arrays,
    write_json,
)
from magus_anharmonic.io.tables import write_table
from magus_anharmonic.notebook import Described
from magus_anharmonic.runs.lock import NAME as LOCK
from magus_anharmonic.sscha.cell import Start, StaticResponse
from magus_anharmonic.sscha.ensemble import Ensemble, joined
from magus_anharmonic.sscha.nonanalytic import NonAnalytic
from magus_anharmonic.sscha.record import FreeEnergy
from magus_anharmonic.sscha.state import SschaState, agree
from magus_anharmonic.sscha.supercells import SupercellMatrix, as_supercell_matrix
from magus_anharmonic.units import GPa


@dataclass(frozen=True, kw_only=True, repr=False)
class SschaResult(Described, FreeEnergy):
    """Free energy of one structure at one pressure and temperature, and the state that it is of.

    All numbers describe one state, and come from one ensemble that no minimisation has seen. A
    number that does not exist (of a run that failed) is ``None``, an array NaN.

    status : "converged", "unconverged" (max_populations reached; the numbers are an upper bound),
    or "failed"; ``converged`` : whether it is the first. reason : why not converged; of a converged
    run what its populations did not suffice to say about its phase, else empty. gibbs : eV/atom;
    raises ``NotConverged`` unless ``converged`` (``numbers.gibbs`` is there all the same), with
    gibbs_error, its standard error by sampling. The other numbers of the free energy: `FreeEnergy`.
    helmholtz : with the finite-size term, eV/atom; stress, stress_error : (3, 3) eV/A^3, ASE's
    sign; force, force_error : (n, 3) eV/A on the centroids, -dF/dR per cell, symmetrised, and its
    standard error; pressure : GPa, positive = compressed; target_pressure : GPa; temperature : K.
    centroids : average positions, one primitive cell (fixed ones: the cell that was given);
    position_error : A, of the least certain centroid. interpolated_imaginary : part of the modes of
    the finite-size mesh that are imaginary (0 where the interpolation can be trusted).
    force_constants : compact, see `state`; None when there is no state. charges, dielectric : Born
    charges (n, 3, 3) and dielectric tensor (3, 3) in the frame of the centroids, see
    `nonanalytic.NonAnalytic`; None where the long-range dipoles are not in G.
    """

    target_pressure: GPa
    temperature: float
    centroids: Atoms
    n_configs: int
    model_id: str
    seconds: float
    helmholtz: float | None = None
    stress: np.ndarray = field(default_factory=lambda: np.full((3, 3), np.nan))
    stress_error: np.ndarray = field(default_factory=lambda: np.full((3, 3), np.nan))
    force: np.ndarray | None = None
    force_error: np.ndarray | None = None
    pressure: GPa | None = None
    position_error: float | None = None
    supercell: SupercellMatrix = (0, 0, 0)
    interpolated_imaginary: float | None = None
    force_constants: np.ndarray | None = None
    charges: np.ndarray | None = None
    dielectric: np.ndarray | None = None

    @property
    def gibbs(self) -> float:
        """Gibbs free energy with the finite-size term, eV/atom; raises ``NotConverged`` where the
        run did not converge. ``numbers.gibbs`` is the number all the same."""
        found = self.numbers.gibbs
        if found is None or not self.converged:
            bound = "" if found is None else " result.numbers.gibbs is its upper bound so far."
            raise NotConverged(
                f"G of {self.centroids.get_chemical_formula()} is not known: the SSCHA run is"
                f" {self.status} ({self.reason}).{bound} Ask result.converged first; the same call"
                " with the same directory and more max_populations goes on."
            )
        return found

    @gibbs.setter
    def gibbs(self, value: float | None) -> None:
        vars(self)["gibbs"] = value

    def described(self) -> dict[str, str]:
        """Structure, conditions and G."""
        found, error = self.numbers.gibbs, self.gibbs_error
        energy = "none" if found is None else f"{found:.5f} +- {error or math.nan:.5f} eV/atom"
        groups = dict.fromkeys(filter(None, (self.space_group_start, self.space_group)))
        return {
            "structure": f"{self.centroids.get_chemical_formula()} {' -> '.join(groups)}",
            "at": f"{self.target_pressure:g} GPa, {self.temperature:g} K",
            "G": energy if self.converged or found is None else f"below {energy}",
            "status": self.status + (f" ({self.reason})" if self.reason else ""),
        }

    @property
    def state(self) -> SschaState:
        """The state, to start another run from; raises ``InputError`` when the run has none."""
        if self.force_constants is None:
            raise InputError(f"start: the SSCHA run ended without a state ({self.reason})")
        return SschaState(self.centroids, self.supercell, self.force_constants, self.temperature)

    @property
    def dipoles(self) -> NonAnalytic | None:
        """Born charges and dielectric tensor of the state; None without."""
        if self.charges is None or self.dielectric is None:
            return None
        return NonAnalytic(self.charges, self.dielectric)

    def write(self, directory: Path) -> None:
        """Write ``result.npz`` (force constants) and then ``result.json``: the run is finished when
        that exists."""
        if self.force_constants is not None:
            write_arrays(
                directory / "result.npz", compressed=True, force_constants=self.force_constants
            )
        write_json(directory / "result.json", self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Everything but the force constants, ready for JSON."""
        data: dict[str, Any] = {**versions(), **vars(self), "converged": self.converged}
        del data["force_constants"]
        for name, value in data.items():
            if isinstance(value, float | np.ndarray):
                data[name] = np.asarray(value).tolist() if np.isfinite(value).all() else None
        data["centroids"] = {
            "symbols": self.centroids.get_chemical_symbols(),
            "cell": self.centroids.cell.array.tolist(),
            "positions": self.centroids.positions.tolist(),
            "masses": self.centroids.get_masses().tolist(),
        }
        return data

    @classmethod
    def read(cls, directory: str | Path) -> SschaResult:
        """Read a finished run; raises ``InputError`` when there is none or it is of another
        version."""
        path = Path(directory) / "result.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file (not the folder of a finished SSCHA run)")
        data = read_json(path)
        if {name: data.pop(name, None) for name in versions()} != versions():
            raise InputError(
                f"{path}: a result of another version of this package, whose numbers are not those"
                " of now; use an empty folder"
            )
        arrays = path.with_name("result.npz")
        with readable(path, "the result of an SSCHA run"):
            found = load_arrays(arrays)["force_constants"] if arrays.is_file() else None
            return cls._from_json({**data, "force_constants": found})

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> SschaResult:
        known = {one.name: one.metadata.get("needed") for one in fields(cls)}
        data = {name: value for name, value in renamed(data).items() if name in known}
        if absent := {name for name, needed in known.items() if needed} - data.keys():
            raise KeyError(", ".join(sorted(absent)))
        for name in ("stress", "stress_error"):
            data[name] = np.full((3, 3), np.nan) if data[name] is None else np.array(data[name])
        for name in ("force", "force_error", "charges", "dielectric"):
            data[name] = None if data.get(name) is None else np.array(data[name])
        if data.get("error_vector") is not None:
            data["error_vector"] = tuple(data["error_vector"])
        data["supercell"] = as_supercell_matrix(data["supercell"])
        data["centroids"] = Atoms(**data["centroids"], pbc=True)
        return cls(**data)


log = logging.getLogger(__name__)

OF_THE_START = {"start", "configurations"}
"""What of a run's identity says where it began."""


PROGRESS = "progress.json"
"""Where a run stands after its last population, see `RunFolder.write_progress`."""
REWEIGHTED = "reweighted.npz"
"""The sample of a run without populations, see `RunFolder.write_reweighted`."""


@dataclass
class Progress:
    """Where a run stands, as ``progress.json`` keeps it beside start and populations: written whole
    after every population.

    rows : of ``convergence.csv``; gibbs : G and its error after each, eV/atom; n_surrogate,
    surrogate_failures : evaluations of the surrogate, and populations in which it did not help;
    pooled : the numbers
    of the populations that the next minimisation uses, those of one state together; cell : matrix
    and covariance of the `CellStiffness`, None with a fixed cell; limited : soft modes were kept
    from moving too far; burn_in : whether the next population is one of burn-in; asked : how often
    the phase was in question; group : the space group once it is decided; open : both groups while
    it is not; moved : whether the run was moved onto another symmetry; requests : the
    configurations that each `SschaRun.advance` was asked for; reason : why the last population does
    not end the run, empty when it does.
    """

    __pydantic_config__ = {"strict": True}

    rows: list[dict[str, Any]] = field(default_factory=list)
    gibbs: list[tuple[float, float]] = field(default_factory=list)
    n_evaluations: int = 0
    n_surrogate: int = field(default=0, metadata={"later": True})
    surrogate_failures: int = field(default=0, metadata={"later": True})
    pooled: list[list[int]] = field(default_factory=list)
    cell: list[Any] | None = None
    limited: bool = False
    burn_in: bool = False
    asked: int = 0
    group: str = ""
    open: str = ""
    moved: bool = False
    requests: list[int | None] = field(default_factory=list)
    reason: str = "no population yet"


def stored_identity(directory: str | Path) -> dict[str, Any] | None:
    """What a run in the folder was asked for; None where there is none."""
    return read_whole(Path(directory) / "settings.json", read_json)


class RunFolder:
    """Files of a run in ``directory``; every file is written whole or not at all.

    kept : False where the folder goes after the run, which then writes no populations.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: dict[str, Any],
        *,
        any_start: bool = False,
        kept: bool = True,
    ) -> None:
        self.kept = kept
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = self.directory / "sscha.log"
        identity = as_stored({**versions(), **identity})
        path = self.directory / "settings.json"
        stored = stored_identity(self.directory)
        known = identity if stored is None else stored
        different = {key for key in {*known, *identity} if known.get(key) != identity.get(key)}
        if any_start and different and different <= OF_THE_START:
            log.info("%s: goes on from the start that it had", self.directory)
        elif different & versions().keys():
            raise InputError(
                f"{self.directory}: holds an SSCHA run of another version of this package; give"
                " another folder"
            )
        elif different - {"model"}:
            raise InputError(
                f"{self.directory}: holds another SSCHA run (different:"
                f" {', '.join(sorted(different))}); give another folder, or the settings of"
                " settings.json"
            )
        elif different:
            self._give_way(str(known["model"]))
        if stored is None or different == {"model"}:
            write_json(path, identity)

    def _give_way(self, model: str) -> None:
        """The files of another model's run move to a folder in this one: its numbers are no numbers
        of this model."""
        aside = self.directory / safe_name("of", model)
        aside.mkdir(exist_ok=True)
        files = [
            path
            for path in self.directory.iterdir()
            if path.is_file() and not path.name.endswith(LOCK)
        ]
        # what makes the folder a run goes last: a move that was interrupted is done again
        for path in sorted(files, key=lambda path: path.name == "settings.json"):
            path.replace(aside / path.name)
        log.warning(
            "%s: held the run of another model, %s, which is now in %s; computed anew",
            self.directory,
            model,
            aside.name,
        )

    def finished(
        self, max_populations: int, error_tolerance: float | None = None
    ) -> SschaResult | None:
        """The stored result, unless it is unconverged, its phase open or less precise than wanted,
        and more populations are allowed now."""
        result = read_whole(
            self.directory / "result.json", lambda path: SschaResult.read(path.parent)
        )
        if result is None:
            return None
        precise = error_tolerance is None or (result.gibbs_error or 0.0) <= error_tolerance
        ended = result.converged and precise and not result.reason
        spent = result.status == "failed" or result.n_populations >= max_populations
        return result if ended or spent else None

    def read_start(self) -> Start | None:
        """The stored start, None when there is none yet."""
        return read_whole(self.directory / "start.npz", read_start_file)

    def write_start(self, start: Start) -> None:
        response = {} if start.response is None else vars(start.response)
        response = {f"response_{name}": value for name, value in response.items()}
        self._write("start.npz", start.state, n_evaluations=start.n_evaluations, **response)

    def read_population(self, number: int, state: SschaState) -> tuple[SschaState, Ensemble] | None:
        """State and ensemble of a finished population, None when it has to be evaluated."""
        path = self.directory / f"population_{number:03d}.npz"
        found = read_whole(path, read_population_file)
        if found is None:
            return None
        known, ensemble = found
        if known.supercell_matrix != state.supercell_matrix:
            raise InputError(f"{path}: another supercell than this run's; give another folder")
        log.info("population %d: taken from %s", number, path)
        return replace(known, temperature=state.temperature), ensemble

    def write_population(self, number: int, state: SschaState, ensemble: Ensemble) -> None:
        if not self.kept:
            return
        from magus_anharmonic.sscha.python_sscha import write_dynamical_matrices

        positions = state.supercell.positions + ensemble.displacements
        self._write(f"population_{number:03d}.npz", state, positions=positions, **vars(ensemble))
        write_dynamical_matrices(state, self.directory / f"dyn_pop{number}_", self.log)

    def read_truth(self, number: int) -> tuple[SschaState, Ensemble] | None:
        """State and truth of the configurations of a population at which the truth was evaluated;
        None where that is not there."""
        for name in ("truth", "population"):
            path = self.directory / f"{name}_{number:03d}.npz"
            found = read_whole(path, read_population_file)
            if found is not None:
                return None if found[1].two_level else found
        return None

    def write_truth(self, number: int, state: SschaState, truth: Ensemble) -> None:
        """What the truth is at level 1 of a population, from which surrogates learn."""
        if self.kept:
            self._write(f"truth_{number:03d}.npz", state, **vars(truth))

    def write_reweighted(self, state: SschaState, ensemble: Ensemble, weights: np.ndarray) -> None:
        """What a run without populations of its own averaged its state over."""
        if self.kept:
            self._write(REWEIGHTED, state, weights=weights, **vars(ensemble))

    def read_pooled(
        self, numbers: list[int], state: SschaState
    ) -> tuple[SschaState, Ensemble] | None:
        """Populations of one state pooled; None when one of them is missing."""
        found = [self.read_population(number, state) for number in numbers]
        if None in found or not found:
            return None
        states, ensembles = zip(*filter(None, found), strict=True)
        return states[-1], joined(ensembles)

    def read_progress(self) -> Progress | None:
        """What `write_progress` left; None without it, and when it is damaged: the run then goes
        over its populations again."""
        return read_whole(self.directory / PROGRESS, read_progress_file)

    def write_progress(self, progress: Progress) -> None:
        """Where the run stands after its last population, beside the populations themselves."""
        write_json(self.directory / PROGRESS, vars(progress))

    def write_convergence(self, rows: list[dict[str, Any]]) -> None:
        """Write ``convergence.csv``: one line per population so far."""
        columns = list(rows[-1])
        lines = ([row.get(column, "") for column in columns] for row in rows)
        write_table(self.directory / "convergence.csv", columns, lines)

    def write_result(self, result: SschaResult) -> None:
        """Write the result; the run is finished then."""
        result.write(self.directory)

    def _write(self, name: str, state: SschaState, **arrays: Any) -> None:
        write_arrays(
            self.directory / name,
            numbers=state.atoms.numbers,
            masses=state.atoms.get_masses(),
            cell=state.atoms.cell.array,
            centroids=state.atoms.positions,
            supercell_matrix=state.supercell_matrix,
            force_constants=state.force_constants,
            temperature=state.temperature,
            **arrays,
        )


def read_population_file(path: Path) -> tuple[SschaState, Ensemble]:
    """State and ensemble of one ``population_NNN.npz``; raises ``DamagedFile``."""
    stored = load_arrays(path)
    with readable(path, "a population of an SSCHA run"):
        state = _state(stored)
        names = ("displacements", "energies", "forces", "stresses")
        # populations of earlier versions have no levels
        ensemble = Ensemble(*(stored[name] for name in names), stored.get("level"))
        n, atoms = len(ensemble.energies), len(state.atoms) * state.n_cells
        shapes = [(n, atoms, 3), (n,), (n, atoms, 3), (n, 3, 3), (n,)]
        if [values.shape for values in vars(ensemble).values()] != shapes:
            raise DamagedFile(f"{path}: arrays do not fit one another")
    return state, ensemble


def read_progress_file(path: Path) -> Progress:
    """Where a run stands, from its ``progress.json``; raises ``DamagedFile``."""
    return read_as(Progress, path, whole=True)


def read_start_file(path: Path) -> Start:
    """The start of a run from its ``start.npz``; raises ``DamagedFile``."""
    stored = load_arrays(path)
    with readable(path, "the start of an SSCHA run"):
        response = None
        if "response_stress" in stored:
            response = StaticResponse(stored["response_stress"], stored["response_forces"])
        return Start(_state(stored), response, int(stored["n_evaluations"]))


def reweighted_ensemble(run: Path) -> tuple[Ensemble, np.ndarray] | None:
    """What `isotopes.reweighted_result` averaged over: displacements about the centroids of the
    result, and weights (n,); None where the run is none of those. Raises ``DamagedFile``."""
    path = run / REWEIGHTED
    if not path.is_file():
        return None
    return read_population_file(path)[1], np.asarray(load_arrays(path)["weights"], dtype=float)


def final_ensemble(run: Path, result: SschaResult) -> Ensemble | None:
    """All populations that were drawn from the state in which a run ended, as one ensemble; None
    when the folder keeps none."""
    found = {number: one for number, (_, one) in final_populations(run, result).items()}
    if any(one.two_level for one in found.values()):
        # of one surrogate alone
        progress = read_whole(run / PROGRESS, read_progress_file)
        last = [max(found)] if progress is None else progress.pooled[-1]
        found = {number: one for number, one in found.items() if number in last}
    return joined(list(found.values())) if found else None


def final_populations(run: Path, result: SschaResult) -> dict[int, tuple[SschaState, Ensemble]]:
    """The populations that were drawn from the state in which a run ended, by their numbers; raises
    ``DamagedFile``."""
    if result.force_constants is None:
        return {}
    read = ((path, read_population_file(path)) for path in sorted(run.glob("population_*.npz")))
    return {
        int(path.stem.removeprefix("population_")): one
        for path, one in read
        if agree(
            result.state,
            one[0],
            "force_constants",
            "atoms.positions",
            "atoms.cell.array",
            atol=1e-9,
        )
    }


def _state(arrays: Mapping[str, Any]) -> SschaState:
    stored = renamed(arrays)
    atoms = Atoms(
        numbers=stored["numbers"],
        positions=stored["centroids"],
        cell=stored["cell"],
        masses=stored["masses"],
        pbc=True,
    )
    return SschaState(
        atoms,
        as_supercell_matrix(stored["supercell_matrix"]),
        stored["force_constants"],
        float(stored["temperature"]),
    )
