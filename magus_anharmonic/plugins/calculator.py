"""The calculator and the fitness that MAGUS knows by name.

The calculator ``mattersim`` of MAGUS: relaxes and evaluates a population in batches at the pressure
of the search.

The fitness ``SSCHA`` of MAGUS: reads what the hook stored, computes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.io import write
from ase.stress import full_3x3_to_voigt_6_stress
from magus.calculators.base import Calculator
from magus.fitness import FitnessCalculator

from magus_anharmonic import evaluator
from magus_anharmonic.energy_surface import require_kind
from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.evaluator import (
    CalculatorEvaluator,
    Evaluator,
    LabelerEvaluator,
    set_energy_errors,
)
from magus_anharmonic.io.digests import digest
from magus_anharmonic.labelers.pool import CallableLabeler
from magus_anharmonic.plugins.parameters import calculator_settings, settings_of, stop
from magus_anharmonic.ranking.evaluators import require_surface
from magus_anharmonic.scheduler import is_remote, open_scheduler
from magus_anharmonic.settings import SCRATCH, snake_case
from magus_anharmonic.sscha.record import INFO_KEYS
from magus_anharmonic.structures import change_of, stripped
from magus_anharmonic.units import gpa_to_ev_per_a3

if TYPE_CHECKING:
    from magus_anharmonic.evaluator import Relaxation
    from magus_anharmonic.potential import Potential


logger = logging.getLogger(__name__)

# What an earlier calculation left in ``info``: it belongs to another structure or another model
# once this one starts.
RESULT_KEYS = ("energy", "energy_error", "forces", "stress", "enthalpy", "trajs", "model")
FREE_ENERGY_KEYS = (*INFO_KEYS.values(), "gibbs_above_hull", "gibbs_model", "candidate_id")


# Keys of a calculator of MAGUS that say how a code is run, not which energy surface it gives.
_EXECUTION = frozenset(
    "job_prefix mode queue_name num_core num_parallel pre_processing preprocessing wait_time"
    " wait_params verbose kill_time memory mem_per_cpu exe_cmd eps max_step max_move max_force"
    " optimizer relax_lattice fix_symmetry kicks perturbations fix_volume connect".split()
)


def surface_settings(calculator: Any, block: Mapping[str, Any] | None) -> dict[str, Any]:
    """What defines the energy surface of a calculator of MAGUS: its ``block`` without the keys of
    execution, and its input files, as trained where it trains them."""
    chosen = {
        key: value for key, value in (block or {}).items() if snake_case(str(key)) not in _EXECUTION
    }
    last = _last_stage(calculator)
    given = Path(getattr(last, "input_dir", os.devnull)).glob("*")
    trained = Path(getattr(last, "ml_dir", os.devnull))
    files = {}
    for file in sorted(file for file in given if file.is_file()):
        own = trained / file.name
        files[file.name] = digest(own if own.is_file() else file, length=None)
    return {**chosen, "files": files}


def _last_stage(calculator: Any) -> Any:
    return getattr(calculator, "calclist", [calculator])[-1]


def result_in(atoms: Atoms) -> dict[str, Any] | None:
    """Energy, forces and stress that a calculator of MAGUS has left in ``info``."""
    if any(key not in atoms.info for key in ("energy", "forces", "stress")):
        return None
    return {key: atoms.info[key] for key in ("energy", "forces", "stress")}


def evaluator_of_magus(search: Any, *, ml: bool) -> Evaluator:
    """What SSCHA asks for energies where ``search`` relaxes with a calculator of MAGUS's own
    (``ml``: its ``MLCalculator``): the ASE calculator in it, or its single points.

    Jobs of single points share its folders, so that they are made by this process alone.
    """
    name = "MLCalculator" if ml else "MainCalculator"
    last = _last_stage(search.ml_calculator if ml else search.main_calculator)
    inside = getattr(last, "scf_calc", None)
    if isinstance(inside, BaseCalculator):
        return CalculatorEvaluator(inside, elements=search.parameters["symbols"])
    labeler = CallableLabeler(
        lambda structures: _single_points(last, structures),
        description=f"{name} ({type(last).__name__})",
        settings=surface_settings(last, search.parameters.get(name)),
    )
    return LabelerEvaluator(labeler, checked=set())


def _single_points(calculator: Any, structures: Sequence[Atoms]) -> list[dict[str, Any] | str]:
    if not hasattr(calculator, "ml_dir"):
        calculator.ml_dir = calculator.input_dir  # MAGUS's mtp-noselect looks for pot.mtp there
    for number, atoms in enumerate(structures):
        atoms.info["identification"] = number  # of MAGUS, which its files keep
    with contextlib.chdir(os.getcwd()):  # left elsewhere when it fails
        found = list(calculator.scf([atoms.copy() for atoms in structures]))
    by_number = {atoms.info.get("identification", n): atoms for n, atoms in enumerate(found)}
    results: list[dict[str, Any] | str] = []
    for number, atoms in enumerate(structures):
        after = by_number.get(number)
        result = None if after is None else result_in(after)
        changed = "" if after is None else change_of(atoms, after)
        results.append(
            f"it {changed}: its results are those of another structure"
            if changed
            else result or "it gave no energy, forces or stress"
        )
    return results


class MatterSimCalculator(Calculator):
    """``MainCalculator`` with ``calculator: mattersim``.

    Results in ``info``: ``energy`` (eV), ``forces`` (N, 3) eV/A, ``stress`` (6,) eV/A^3 in ASE's
    sign and Voigt order, ``enthalpy`` (eV/atom, at ``pressure``), ``model`` (id of the weights),
    after a relaxation ``trajs`` (first and last frame). A structure without a result is left out of
    what is returned; the reason is in the log. The model is loaded at first use and left out of
    pickles.
    """

    is_learner = False
    seed = 0
    generation = 1
    learned_until: int | None = None
    """Last round whose model may be used; None: the newest."""

    def __init__(self, **parameters: Any) -> None:
        try:
            self.settings = settings_of(parameters)
            self.options = calculator_settings(self.settings, learner=self.is_learner)
            self.checkpoint = self._find_checkpoint()
        except InputError as error:
            stop(error)
        super().__init__(
            **{
                **parameters,
                "job_prefix": self.options.job_prefix,
                "pressure": self.settings.pressure,
            }
        )
        self.work_dir, self.calc_dir = (
            os.path.abspath(self.work_dir),
            os.path.abspath(self.calc_dir),
        )
        self.main_info.extend(["checkpoint", "options"])
        self._potential: Potential | None = None

    def _find_checkpoint(self) -> str:
        # Other calculators of MAGUS change the working directory, so a relative path is made
        # absolute here.
        from magus_anharmonic.potential import checkpoint

        if self.settings.from_scratch:
            return SCRATCH
        return str(checkpoint.resolve(self.options.checkpoint).absolute())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_potential": None}

    @property
    def run_dir(self) -> Path:
        """Folder of this package's files, ``results/anharmonic``."""
        return Path(self.work_dir) / "results" / "anharmonic"

    @property
    def potential(self) -> Potential:
        """The model in use; loaded when it is first needed: what this search learned last, else
        ``checkpoint``."""
        if self._potential is None:
            from magus_anharmonic.potential import load

            _refuse_forked_cuda(self.options.device)
            self.checkpoint = self._learned() or self.checkpoint
            self._potential = load(self.checkpoint, self.options.device)
            if self.settings.on_free_energy:
                require_surface(self._potential, self.settings)
            else:
                require_kind(self._potential, self.options.surface, "MainCalculator")
            logger.info("MatterSim model %s from %s", self._potential.model_id, self.checkpoint)
        return self._potential

    def begin_round(self, generation: int) -> None:
        """Everything up to the next call belongs to this round, which begins with the model that
        the one before has left.

        MAGUS's restart repeats its last round: relaxed with the model that this round learned
        already, it would find other structures.
        """
        self.generation, self.learned_until = generation, generation - 1

    def use(self, potential: Potential) -> None:
        """Take another model, e.g. the one just finetuned."""
        self._potential = potential
        if potential.path is not None:
            self.checkpoint = str(Path(potential.path).absolute())

    def _learned(self) -> str | None:
        if self.settings.learning is None:
            return None
        from magus_anharmonic.generation import newest_checkpoint

        newest = newest_checkpoint(self.run_dir, self.learned_until)
        return None if newest is None else str(newest)

    def relax_(self, calcPop: Sequence[Atoms], *args: Any, **kwargs: Any) -> list[Atoms]:  # noqa: N803 (MAGUS's name)
        """Relax ``calcPop`` in place; MAGUS's ``logfile`` and ``trajname`` are accepted and not
        needed."""
        individuals = list(calcPop)
        if not individuals:
            return []
        starts = [stripped(atoms, constraints=True) for atoms in individuals]
        self._clear(individuals)
        results = self._relaxed(starts)
        for atoms, start, result in zip(individuals, starts, results, strict=True):
            if not result.failed:
                self._take(atoms, start, result)
        logger.info(
            "relaxation steps: %d in all, %d structures converged",
            sum(result.n_steps for result in results),
            sum(bool(result.converged) for result in results),
        )
        reasons = [result.reason if result.failed else None for result in results]
        return self._done(individuals, reasons, "relaxation")

    def _relaxed(self, starts: list[Atoms]) -> list[Relaxation]:
        from magus_anharmonic.potential.relax import relax_on, relax_options

        options = relax_options(self.options)
        if not is_remote(self.settings.scheduler):
            return self.potential.relax(starts, self.pressure, **options)
        with open_scheduler(self.settings) as scheduler:
            return relax_on(scheduler, self.potential, starts, self.pressure, **options)

    def scf_(self, calcPop: Sequence[Atoms]) -> list[Atoms]:  # noqa: N803
        """Single points of ``calcPop`` in place."""
        individuals = list(calcPop)
        self._clear(individuals)
        outcomes = evaluate_each(self.potential, individuals)
        for atoms, outcome in zip(individuals, outcomes, strict=True):
            if not isinstance(outcome, str):
                self._store_result(atoms, *outcome)
        reasons = [outcome if isinstance(outcome, str) else None for outcome in outcomes]
        return self._done(individuals, reasons, "single point")

    def _take(self, atoms: Atoms, start: Atoms, result: Relaxation) -> None:
        atoms.set_cell(result.atoms.cell.array)
        # not set_positions, which leaves an atom behind that the relaxation moved with its cell
        atoms.positions = result.atoms.positions
        self._store_result(atoms, result.energy, result.forces, result.stress)
        atoms.wrap()
        atoms.info["trajs"] = [stripped(start), stripped(atoms)]
        atoms.info["n_evaluations"] = int(result.n_steps)

    def _store_result(
        self, atoms: Atoms, energy: float, forces: np.ndarray, stress: np.ndarray
    ) -> None:
        volume_term = gpa_to_ev_per_a3(self.pressure) * atoms.get_volume()
        atoms.calc = None
        atoms.info.update(
            energy=float(energy),
            forces=np.array(forces, dtype=float),
            stress=full_3x3_to_voigt_6_stress(np.asarray(stress, dtype=float)),
            enthalpy=float((energy + volume_term) / len(atoms)),
            model=self.potential.model_id,
        )

    @staticmethod
    def _clear(individuals: Iterable[Atoms]) -> None:
        for atoms in individuals:
            atoms.calc = None
            for key in (*RESULT_KEYS, *FREE_ENERGY_KEYS):
                atoms.info.pop(key, None)

    def _done(
        self, individuals: list[Atoms], reasons: Sequence[str | None], what: str
    ) -> list[Atoms]:
        """The structures that have a result, with its expected error; the others, which have a
        reason, are written down."""
        paired = list(zip(individuals, reasons, strict=True))
        done = [atoms for atoms, reason in paired if reason is None]
        failed = [_dropped(atoms, reason, what) for atoms, reason in paired if reason is not None]
        set_energy_errors(self.potential, done)
        model = self.potential.model_id
        logger.info("%s: %d done with model %s, %d failed", what, len(done), model, len(failed))
        if failed:
            write(os.path.join(self.calc_dir, "errorTraj.traj"), failed)
        return done


def evaluate_each(
    potential: Any, structures: Sequence[Atoms]
) -> list[tuple[float, np.ndarray, np.ndarray] | str]:
    """Energy, forces, stress (3, 3) of each structure, or the reason why it has none: one bad
    structure spoils no batch."""
    return [
        one if isinstance(one, str) else (float(one.energy[0]), one.forces[0], one.stress[0])
        for one in evaluator.evaluate_each(potential, [stripped(atoms) for atoms in structures])
    ]


def _dropped(atoms: Atoms, reason: str, what: str) -> Atoms:
    logger.warning(
        "%s of %s (%s) failed and the structure is left out: %s",
        what,
        atoms.info.get("identity", "a structure"),
        atoms.get_chemical_formula(),
        reason,
    )
    copy = stripped(atoms)
    copy.info["reason"] = reason
    return copy


def _refuse_forked_cuda(device: str | None) -> None:
    torch = sys.modules.get("torch")
    if device != "cpu" and torch is not None and torch.cuda._is_in_bad_fork():
        raise MagusAnharmonicError(
            "calculator mattersim: CUDA cannot be used in the forked workers of `magus search -p`;"
            " run without -p (structures are relaxed in batches in one process), or set device: cpu"
        )


class NamedFitness(FitnessCalculator):
    """``Fitness: [SSCHA]``: minus the free energy in eV/atom, an estimate where SSCHA has not run;
    always finite. Or the fitness that another package declares under ``name``.

    With ``formulaType: var`` minus its distance above the hull of the population, as MAGUS's
    ``Ehull`` for enthalpies.

    MAGUS asks 5 to 10 times per search round, on duplicates and in forked workers, so this must
    stay cheap.
    """

    def __init__(self, parameters: Any, name: str = "SSCHA") -> None:
        super().__init__(parameters)
        self.name = name
        try:
            self._function()
        except InputError as error:
            stop(error)

    def _function(self) -> Any:
        from magus_anharmonic.ranking.fitness import population_fitness, third_party_fitness

        return population_fitness if self.name == "SSCHA" else third_party_fitness(self.name)

    def calc(self, pop: Any) -> None:
        """Set ``info['fitness'][name]`` of every individual, the name in small letters."""
        individuals = list(pop)
        for individual, value in zip(individuals, self._function()(individuals), strict=True):
            individual.info["fitness"][self.name.lower()] = value
