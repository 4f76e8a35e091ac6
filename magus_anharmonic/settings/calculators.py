"""Who computes: keys of the calculators, the labeler, the workers, and of training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from magus_anharmonic import third_party
from magus_anharmonic.settings.section import (
    FOUNDATION,
    Checkpoint,
    Count,
    Device,
    Energy,
    Force,
    In,
    InsidePath,
    Length,
    NonNegative,
    OfThree,
    Positive,
    Seconds,
    Section,
    Share,
    Spacing,
    Three,
    parse,
    snake_case,
)

Optimizer = Literal["bfgs", "ase", "fire"]
Optimizers = Optimizer | Annotated[list[Optimizer], Field(min_length=1)]
OPTIMIZER_DESCRIPTION = (
    "ase: ASE's BFGS with FrechetCellFilter, step for step; bfgs: quasi-Newton steps, a third fewer"
    " but more often to a higher minimum; fire: damped dynamics, slower; a list of them: each from"
    " the start, the lowest end is kept"
)


class RelaxationSettings(Section):
    """How a calculator's block says to relax; names as in MAGUS."""

    old_names = {"kicks": "perturbations"}

    calculator: str = Field(
        description="mattersim, emt, lj, a name of an installed package, or the import path of an"
        " ASE calculator"
    )
    job_prefix: str | list[str] = Field(
        "ASE", description="MAGUS's folder name; the embedded host makes no such folder"
    )
    eps: Force = Field(0.05, description="relaxation ends below this force, eV/A (MAGUS's name)")
    max_step: Count = Field(300, description="most relaxation steps")
    max_move: Length = Field(0.1, description="longest step of one atom, Angstrom")
    optimizer: Optimizers = Field("ase", description=OPTIMIZER_DESCRIPTION)
    relax_lattice: bool = Field(True, description="relax the cell too")
    fix_symmetry: bool = Field(False, description="keep the space group while relaxing")
    perturbations: int = Field(
        0,
        ge=0,
        description=(
            "times that a relaxed structure is displaced at random and relaxed again, for each"
            " optimizer, the lowest being kept; off saddle points, at about a third of the cost of"
            " a relaxation each. All steps count for max_step. Old name: kicks"
        ),
    )


class CalculatorSettings(RelaxationSettings):
    """``MainCalculator`` or ``MLCalculator`` with ``calculator: mattersim``."""

    calculator: Literal["mattersim"] = Field(
        "mattersim", description="name under which MAGUS finds this calculator"
    )
    job_prefix: InsidePath = Field(
        "MatterSim", description="folder name under calcFold/ and mlFold/"
    )
    checkpoint: Checkpoint = FOUNDATION
    device: Device = None
    surface: Literal["static", "free-energy"] = Field(
        "static",
        description=(
            "what the checkpoint must be: a potential, or a model of the SSCHA free energy F(R,"
            " cell), which is relaxed and ranked on like one; the other kind is refused"
        ),
    )

    @model_validator(mode="after")
    def _perturbations_break_symmetry(self) -> CalculatorSettings:
        if self.perturbations and self.fix_symmetry:
            raise ValueError("perturbations must be 0 with fix_symmetry, because they break it")
        return self


class AseCalculatorSettings(RelaxationSettings):
    """``MainCalculator`` with any other ASE calculator; names and defaults as in MAGUS."""

    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the calculator"
    )
    max_step: Count = Field(100, description="most relaxation steps")


SHORT_NAMES = {"emt": "ase.calculators.emt.EMT", "lj": "ase.calculators.lj.LennardJones"}
IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def import_path(name: str) -> str | None:
    """Of the ASE calculator that a block names, in full or short; None where the name is a
    checkpoint, or one that MAGUS alone knows."""
    path = SHORT_NAMES.get(name, name)
    return path if IMPORT_PATH.fullmatch(path) and not path.endswith(".pth") else None


def is_evaluator(name: str) -> bool:
    """Whether a block's ``calculator`` is one that is made here: an ASE calculator, or another
    package's evaluator."""
    return import_path(name) is not None or name in third_party.declared("evaluators")


def parse_calculator(
    named: str | Mapping[str, Any], where: str
) -> CalculatorSettings | AseCalculatorSettings:
    """The block of a calculator (mattersim where it does not say), or what a name alone stands for:
    the import path of an ASE calculator, another package's evaluator, or a checkpoint. Raises
    ``InputError`` that begins with ``where``."""
    if isinstance(named, str):
        named = {"calculator" if is_evaluator(named) else "checkpoint": named}
    ours = named.get("calculator", "mattersim") == "mattersim"
    return parse(CalculatorSettings if ours else AseCalculatorSettings, dict(named), where)


_PER_STAGE = frozenset(
    ("calculator", "job_prefix", "eps", "max_step", "max_move", "optimizer", "relax_lattice")
)


def as_magus_reads(block: Any) -> Any:
    """A calculator's block as MAGUS takes it: lists of one stage are that stage, and without
    ``calculator`` the ``jobPrefix`` names it."""
    if not isinstance(block, dict):
        return block
    by_name = {snake_case(str(key)): value for key, value in block.items()}
    prefix = by_name.get("job_prefix")
    if isinstance(prefix, list) and len(prefix) == 1:
        single = {
            key: value[0]
            for key, value in block.items()
            if isinstance(value, list) and len(value) == 1 and snake_case(key) in _PER_STAGE
        }
        return as_magus_reads({**block, **single})
    if by_name.get("calculator") is not None or not prefix:
        return block
    guess = [
        re.sub(r"\d", "", str(name)).lower()
        for name in (prefix if isinstance(prefix, list) else [prefix])
    ]
    return {**block, "calculator": guess if isinstance(prefix, list) else guess[0]}


def stages(block: Any) -> list[str]:
    """Names of the calculators of a block of `as_magus_reads`: one, or one for each stage of a
    chain."""
    named = block.get("calculator") if isinstance(block, dict) else None
    return (
        [str(name) for name in named]
        if isinstance(named, list)
        else []
        if named is None
        else [str(named)]
    )


class LabelerSettings(Section):
    """Where DFT labels come from."""

    calculator: str = Field(
        description=(
            "gpaw | vasp | espresso | sscha (F at fixed centroids on the potential"
            " arguments.evaluator) | main (MAGUS's MainCalculator, under magus search -m) | an"
            " installed package's name | import path of an ASE calculator, e.g."
            " ase.calculators.emt.EMT"
        )
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the calculator"
    )
    k_spacing: Spacing | None = Field(
        None, description="k-point spacing in 2 pi / A, Gamma-centred; default by labeler"
    )
    n_workers: Count | None = Field(
        None,
        description=(
            "labels at the same time with scheduler: local; left out: workers.count, or one per"
            " core"
        ),
    )
    timeout: Seconds = Field(3600.0, description="seconds after which one label is given up")

    @model_validator(mode="before")
    @classmethod
    def _sscha_in_one_block(cls, data: Any) -> Any:
        """``{calculator: sscha, temperature: 300, ...}``: keys of SSCHA are arguments of it."""
        if not isinstance(data, dict) or data.get("calculator") != "sscha":
            return data
        own = {key for key in data if snake_case(str(key)) in cls.model_fields}
        arguments = data.get("arguments") or {}
        rest = {snake_case(str(key)): value for key, value in data.items() if key not in own}
        if not isinstance(arguments, dict) or not rest:
            return data
        return {key: data[key] for key in own} | {"arguments": {**arguments, **rest}}


QUEUES = ("slurm", "lsf", "pbs")
"""Queue systems that ``scheduler`` knows."""


class WorkerSettings(Section):
    """``workers``: who runs labels, relaxations and SSCHA; what only jobs of a queue system need is
    ignored by ``scheduler: local``."""

    count: Count | None = Field(
        None,
        description="workers (jobs) at the same time; left out: one per core (local), or one job",
    )
    cores: Count | None = Field(
        None,
        description="cores, hence threads, of each; left out: a share of the machine (local), or 1",
    )
    gpus: int = Field(0, ge=0, description="GPUs of each job; more than one needs dask-cuda")
    memory: str = Field("8 GB", description="of each job")
    walltime: Annotated[int, In("s")] = Field(
        86400,
        ge=600,
        description="of each job: hh:mm:ss, 24 h, or seconds; jobs that end are sent again",
    )
    queue: str | None = Field(None, description="queue or partition")
    account: str | None = Field(None, description="account or project")
    directives: list[str] = Field(
        default_factory=list,
        description="further lines of the job script, without #SBATCH, #BSUB or #PBS",
    )
    prologue: list[str] = Field(
        default_factory=list,
        description="shell lines before the worker starts, e.g. module load, source .../activate",
    )
    python: InsidePath | None = Field(
        None, description="Python on the nodes; left out: the one that runs the search"
    )
    interface: str | None = Field(
        None, description="network interface, e.g. ib0; left out: the default route"
    )
    scratch: InsidePath | None = Field(
        None,
        description=(
            "folder for temporary files on the nodes; left out: the working directory of the job"
        ),
    )
    logs: InsidePath = Field("worker-logs", description="folder for the output of the jobs")
    timeout: Seconds = Field(
        30.0, description="seconds in which a Dask scheduler at an address must answer"
    )

    @field_validator("memory")
    @classmethod
    def _with_unit(cls, value: str) -> str:
        if not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]i?B", value):
            raise ValueError("must be a number with a unit, e.g. 16 GB")
        return value

    @field_validator("walltime", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        # YAML 1.1 reads 24:00:00 without quotes as the whole number 86400.
        clock = isinstance(value, str) and re.fullmatch(r"(\d+):(\d+)(?::(\d+))?", value)
        if not clock:
            return value
        hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return 3600 * hours + 60 * minutes + seconds


class TrainingKeys(Section):
    """What every training has: steps and loss."""

    epochs: Count = Field(50, description="passes through the training set")
    learning_rate: Positive = Field(2.0e-4, lt=1.0, description="of Adam, at the start")
    batch_size: Count = Field(8, description="structures per step")
    loss: Literal["huber", "mse"] = Field(
        "huber", description="Huber with delta 0.01, or mean square"
    )
    force_loss_ratio: NonNegative = Field(1.0, description="weight of the force loss (eV/A)")
    stress_loss_ratio: NonNegative = Field(0.1, description="weight of the stress loss (GPa)")


class FinetuneSettings(TrainingKeys):
    """One training stage."""

    schedule: Literal["step", "cosine"] = Field(
        "step",
        description=(
            "step: x 0.95 every 10 epochs, as MatterSim; cosine: to 1 % of the learning rate at the"
            " last epoch"
        ),
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="of the averaged weights that are validated and kept"
    )
    keep: Literal["best", "last"] = Field(
        "best",
        description=(
            "best: the lowest validation loss, the start included; last: the averaged weights at"
            " the end, whatever they are"
        ),
    )
    patience: Count | None = Field(
        None, description="stop after so many epochs without improvement; left out: never"
    )


class Architecture(Section):
    """Shape of a MatterSim (M3GNet) model; the defaults make a small one (162 k parameters).
    MatterSim-v1.0.0-1M: 3 blocks of 128 units."""

    num_blocks: Count = Field(2, description="message-passing blocks")
    units: Count = Field(64, description="width of atom and edge features")
    cutoff: Length = Field(5.0, description="Angstrom, of the edges")
    threebody_cutoff: Length = Field(
        4.0, description="Angstrom, of the bonds that make angles; at most the cutoff"
    )


class ScratchSettings(Section):
    """``learning.scratch``: the first model with ``checkpoint: scratch``."""

    n_structures: Count = Field(40, description="random crystals labelled in each batch")
    batches: Count = Field(
        3,
        description=(
            "the first as drawn; the crystals of the others are first followed downhill for a few"
            " steps of the model so far; fewer once learning.target_rmse is met"
        ),
    )
    architecture: Architecture = Field(
        default_factory=Architecture, description="shape of the model"
    )
    stages: list[FinetuneSettings] = Field(
        default_factory=lambda: [
            FinetuneSettings(
                epochs=100,
                learning_rate=2.0e-3,
                batch_size=4,
                schedule="cosine",
                force_loss_ratio=0.2,
                stress_loss_ratio=0.02,
                keep="last",
            ),
            FinetuneSettings(
                epochs=20,
                learning_rate=6.0e-4,
                batch_size=8,
                loss="mse",
                schedule="cosine",
                force_loss_ratio=0.01,
                stress_loss_ratio=1.0e-4,
                keep="last",
            ),
        ],
        min_length=1,
        description=(
            "trainings after each other: forces first, then energies; each with the keys of a"
            " stage of a recipe"
        ),
    )


class LearningSettings(TrainingKeys):
    """``learning``: choose, distort, label, finetune after each generation (Secs. III A and IV A of
    the paper)."""

    labeler: LabelerSettings = Field(description="the DFT code and its settings")
    required: bool = Field(
        True,
        description="false: where the labeler is not installed, run without learning and say so",
    )
    select: Literal["random", "uncertain", "diverse", "sscha"] = Field(
        "random",
        description=(
            "how structures are chosen; left out with surface: free-energy: uncertain. random:"
            " duplicates kept, as in the paper; uncertain: of the"
            " lowest distinct ones (10 n_sample) those with the largest expected error, at random"
            " while the model has no error estimate; diverse: those farthest from one another and"
            " from the labels in the model's features; sscha: configurations (n_sample x n_perturb)"
            " of the SSCHA ensembles of the candidates whose order is undecided, where they narrow"
            " the differences of G most, and distorted structures for validation and test; at"
            " random while there are none (needs sscha.when: every_generation)"
        ),
    )
    n_sample: Count = Field(10, description="structures chosen per generation")
    n_perturb: Count = Field(10, description="distortions of each")
    atom_displacement: Annotated[NonNegative, In("A")] = Field(
        0.05, le=1.0, description="Angstrom, random direction, fixed length"
    )
    strain: NonNegative = Field(
        0.05, le=0.3, description="six components uniform in [-strain, +strain]"
    )
    n_replay: Annotated[int, Field(ge=0, strict=True)] = Field(
        100, description="structures drawn from the previous training set"
    )
    split: Three = Field(
        (8, 1, 1),
        description=(
            "train : validation : test in every generation, by whole phases, at least one structure"
            " each"
        ),
    )
    target_rmse: Energy | None = Field(
        None,
        description=(
            "eV/atom on the search's own validation labels: the model counts as converged below it"
        ),
    )
    dataset: InsidePath | None = Field(
        None,
        description=(
            "earlier labels of the same DFT settings, for replay and for the first model of"
            " checkpoint: scratch: extxyz, or a shipped checkpoint's name"
        ),
    )
    scratch: ScratchSettings = Field(
        default_factory=ScratchSettings,
        description="how the first model is made with checkpoint: scratch",
    )


class StageSettings(FinetuneSettings):
    """One entry of ``final.stages``."""

    epochs: Count = Field(100, description="passes through the training set")
    learning_rate: Positive = Field(1.0e-3, lt=1.0, description="of Adam, at the start")
    stress_loss_ratio: NonNegative = Field(1.0, description="weight of the stress loss (GPa)")


def _paper_stages() -> list[StageSettings]:
    return [StageSettings(), StageSettings(force_loss_ratio=0.1, stress_loss_ratio=0.1)]


class MergeSettings(Section):
    """``merge``: one data set from all searches; the distortions of one phase stay on one side."""

    split: Annotated[tuple[Count, Share, Share], OfThree] = Field(
        (8, 1, 1), description="train : validation : test, by families of parents"
    )
    dataset: InsidePath | None = Field(
        None,
        description=(
            "earlier labels of the same DFT settings, for training only: extxyz, or a shipped"
            " checkpoint's name"
        ),
    )
    n_dataset: Count | None = Field(
        None, description="so many of them, drawn at random; left out: all"
    )


class FinalSettings(Section):
    """``final``: the final model, finetuned from the foundation checkpoint on the merged labels
    (Sec. IV A of the paper)."""

    refit_shift: bool = Field(
        True, description="fit the energy shift per species to the training labels first"
    )
    stages: list[StageSettings] = Field(
        default_factory=_paper_stages,
        min_length=1,
        description=(
            "one after the other; the paper's two: force/stress ratios 1, then 0.1. Left out with"
            " foundation: scratch: those of learning.settings.scratch"
        ),
    )
