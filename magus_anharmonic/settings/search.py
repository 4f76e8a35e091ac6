"""Every key that this package adds to ``input.yaml``: names, units, defaults, limits.

The tree is pydantic; camelCase and snake_case are both accepted; a wrong key, type, unit or
combination raises ``InputError`` with one line per problem (key path, value, what is allowed,
nearest valid key). MAGUS's own keys are in ``host_keys``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings.calculators import (
    QUEUES,
    AseCalculatorSettings,
    CalculatorSettings,
    LabelerSettings,
    LearningSettings,
    WorkerSettings,
    as_magus_reads,
    import_path,
    parse_calculator,
    stages,
)
from magus_anharmonic.settings.section import (
    SCRATCH,
    Count,
    Element,
    PressureGPa,
    Section,
    absolute_file,
    load_yaml,
    parse,
    snake_case,
)
from magus_anharmonic.settings.sscha import SschaSettings

LABELER = "sscha"
"""The labeler that makes labels of a free energy."""


def _once(symbols: list[str]) -> list[str]:
    """The same; ValueError for one that is there twice: no crystal would ever fit its formula."""
    for symbol in symbols:
        if symbols.count(symbol) > 1:
            raise ValueError(f"{symbol} is given twice")
    return symbols


def problem_of_surface(
    block: CalculatorSettings | None,
    learning: LearningSettings | None,
    sscha: SschaSettings | None,
    *,
    under_m: bool,
) -> str:
    """What of the keys does not go together with ``surface: free-energy``, or goes with it alone;
    empty where all is well. ``block`` : of the calculator, ``under_m`` : whether that is
    MLCalculator."""
    labels = learning is not None and learning.labeler.calculator == LABELER
    if block is None or block.surface == "static":
        return (
            "learning.labeler: calculator: sscha makes labels of a free energy, which the model"
            " then is: add surface: free-energy to MainCalculator"
            if labels and block is not None
            else ""
        )
    if under_m:
        return (
            "MLCalculator.surface: free-energy: under magus search -m labels are those of"
            " MainCalculator; take the block as MainCalculator, without -m"
        )
    if learning is not None and not labels:
        return (
            f"learning.labeler: calculator: {learning.labeler.calculator}: with surface:"
            " free-energy the labels are free energies: calculator: sscha"
        )
    if learning is not None and learning.select == "sscha":
        return (
            "learning.select: sscha labels configurations of an ensemble, on which there is no free"
            " energy; with surface: free-energy take uncertain, diverse or random"
        )
    if block.checkpoint == SCRATCH:
        return "checkpoint: scratch: a free-energy model begins from its potential; give that"
    if sscha is None:
        return ""
    if not sscha.evaluator:
        return (
            "sscha.evaluator: with surface: free-energy SSCHA certifies what is found, on the"
            " potential that the model is of: give its checkpoint"
        )
    if len(sscha.temperatures) > 1:
        return "sscha.temperature: a list: one free-energy surface has one temperature"
    return ""


def with_its_defaults(learning: LearningSettings | None) -> LearningSettings | None:
    """On a free energy ``learning.select``, where it is left out, is ``uncertain``: labels are few
    and dear, and go where the model knows least."""
    if learning is None or "select" in learning.model_fields_set:
        return learning
    return learning.model_copy(update={"select": "uncertain"})


class Settings(Section):
    """Everything of one search that this package acts on; MAGUS's remaining keys are in
    ``host``."""

    pressure: PressureGPa = Field(0.0, description="GPa (MAGUS's key)")
    seed: int | None = Field(
        None,
        ge=0,
        description="same input and seed, same result; left out: drawn once and recorded",
    )
    symbols: Annotated[list[Element], AfterValidator(_once)] = Field(
        default_factory=list, description="MAGUS's key: the elements"
    )
    formula_type: Literal["fix", "var"] = Field("fix", description="MAGUS's key")
    fitness: list[str] = Field(
        default_factory=list,
        description=(
            "MAGUS's key, also with names of installed packages; [SSCHA] ranks by free energy,"
            " above its hull with formulaType: var"
        ),
    )
    num_gen: Count | None = Field(None, description="MAGUS's key: the number of generations")
    main_calculator: dict[str, Any] = Field(
        default_factory=dict, description="MAGUS's block; ours with calculator: mattersim"
    )
    ml_calculator: dict[str, Any] = Field(
        default_factory=dict, description="MAGUS's block under magus search -m"
    )
    learning: LearningSettings | None = Field(None, description="left out: no learning")
    sscha: SschaSettings | None = Field(None, description="left out: static enthalpies")
    scheduler: str = Field(
        "local",
        description=(
            "who runs labels, relaxations and SSCHA: local (processes of this machine), serial, the"
            " address of a Dask scheduler (tcp://host:port), or jobs of slurm, lsf or pbs: see"
            " [clusters.md](clusters.md)"
        ),
    )
    workers: WorkerSettings = Field(
        default_factory=WorkerSettings, description="how many workers, and what each has"
    )
    host: dict[str, Any] = Field(default_factory=dict, description="every other key: MAGUS's own")

    @property
    def labelers(self) -> dict[str, LabelerSettings]:
        """Who makes labels, by the key that asks for it."""
        found = {
            "learning.labeler": self.learning.labeler if self.learning else None,
            "sscha.truth": self.sscha.truth if self.sscha else None,
        }
        return {key: labeler for key, labeler in found.items() if labeler is not None}

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        if value in ("local", "serial", *QUEUES) or re.fullmatch(
            r"(tcp|tls)://(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}", value
        ):
            return value
        raise ValueError(
            f"must be local, serial, {', '.join(QUEUES)}, or the address of a Dask scheduler, e.g."
            " tcp://10.0.0.1:8786"
        )

    @field_validator("main_calculator", "ml_calculator", mode="before")
    @classmethod
    def _one_stage(cls, value: Any) -> Any:
        block = as_magus_reads(value)
        chain = stages(block)
        if "mattersim" in chain[1:] or (len(chain) > 1 and chain[0] == "mattersim"):
            raise ValueError(
                f"jobPrefix: mattersim cannot be a stage of a chain ({', '.join(chain)}); give one"
                " name"
            )
        return block

    @model_validator(mode="after")
    def _combinations(self) -> Settings:
        if "SSCHA" in self.fitness and self.sscha is None:
            raise ValueError(
                "Fitness: [SSCHA] needs the block sscha: (an empty one, sscha: {}, takes the"
                " paper's values)"
            )
        if len(self.fitness) > 1 and "SSCHA" in self.fitness:
            raise ValueError(
                f"Fitness: {self.fitness}: SSCHA ranks alone (two fitnesses make a Pareto front);"
                " give [SSCHA]"
            )
        if self.learning is not None and self.learning.select == "sscha" and self.sscha is None:
            raise ValueError(
                "learning.select: sscha takes labels from SSCHA ensembles: it needs the block"
                " sscha: (when: every_generation)"
            )
        if (
            self.learning is not None
            and self.learning.select == "sscha"
            and self.formula_type == "var"
        ):
            raise ValueError(
                "learning.select: sscha with formulaType: var: it labels what decides between"
                " phases of one composition; choose another learning.select, or formulaType: fix"
            )
        under_m = bool(self.ml_calculator)
        problem = problem_of_surface(self.calculator, self.learning, self.sscha, under_m=under_m)
        if problem:
            raise ValueError(problem)
        learns = self.learning is not None and not self.on_free_energy
        if learns and self.sscha is not None and self.sscha.evaluator:
            raise ValueError(
                "sscha.evaluator: with learning the model that learns is the one that ranks; take"
                " out one of the two"
            )
        _ = self.evaluator
        if self.from_scratch and self.learning is None:
            raise ValueError(
                "checkpoint: scratch: new weights know nothing before they are trained: add"
                " learning: with a labeler, or give a checkpoint"
            )
        if self.from_scratch and self.ml_calculator:
            raise ValueError(
                "MLCalculator.checkpoint: scratch: MAGUS relaxes before it labels; take calculator:"
                " mattersim, checkpoint: scratch as MainCalculator, without -m"
            )
        return self

    @property
    def on_free_energy(self) -> bool:
        """Whether the search relaxes on a free energy, and not on an energy."""
        return self.calculator is not None and self.calculator.surface == "free-energy"

    @property
    def from_scratch(self) -> bool:
        """Whether the search begins without any model."""
        return self.calculator is not None and self.calculator.checkpoint == SCRATCH

    @property
    def calculator(self) -> CalculatorSettings | None:
        """The block with ``calculator: mattersim``: MLCalculator first, else MainCalculator, else
        None."""
        for name, block in (
            ("MLCalculator", self.ml_calculator),
            ("MainCalculator", self.main_calculator),
        ):
            if block.get("calculator") == "mattersim":
                return parse(CalculatorSettings, block, name)
        return None

    @property
    def evaluator(self) -> CalculatorSettings | AseCalculatorSettings | None:
        """The block of ``sscha.evaluator``; None: the calculator of the search ranks."""
        named = None if self.sscha is None else self.sscha.evaluator
        return None if named is None else parse_calculator(named, "sscha.evaluator")


def load_settings(path: str | Path) -> Settings:
    """Read and validate ``input.yaml``; every problem in one ``InputError``."""
    return parse_settings(load_yaml(path))


def parse_settings(data: Mapping[str, object]) -> Settings:
    """Validate the mapping of an ``input.yaml``; MAGUS's remaining keys end up in
    ``Settings.host``."""
    ours: dict[str, Any] = {}
    host: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in data.items():
        name = {"MLCalculator": "ml_calculator"}.get(str(key), snake_case(str(key)))
        if name in Settings.model_fields and name != "host":
            if name in ours:
                problems.append(f"{key}: is given twice (camelCase and snake_case)")
            ours[name] = {} if value is None and name in ("sscha", "learning", "workers") else value
        else:
            host[str(key)] = value
    try:
        found = parse(Settings, {**ours, "host": host})
        learning = with_its_defaults(found.learning) if found.on_free_energy else found.learning
        return found.model_copy(update={"learning": learning})
    except InputError as error:
        problems.extend(_public_name(line) for line in error.problems)
    raise InputError(*problems)


def _public_name(line: str) -> str:
    for name, public in (("main_calculator", "MainCalculator"), ("ml_calculator", "MLCalculator")):
        if line.startswith(name):
            return public + line[len(name) :]
    return line


def rank_settings(
    file: str | Path | None,
    given: Mapping[str, Any],
    *,
    calculator: Mapping[str, Any],
    sscha: Mapping[str, Any],
) -> Settings:
    """Settings of a ranking: what was ``given`` for the top level, for the block of the calculator
    and for the block ``sscha`` (None: not given), else the keys of ``file``, else the defaults.

    Raises ``InputError``.
    """
    data = {
        name if (name := snake_case(str(key))) in Settings.model_fields else str(key): value
        for key, value in (load_yaml(file) if file else {}).items()
    }
    block = as_magus_reads(data.get("main_calculator")) or {}
    wanted = {key: value for key, value in calculator.items() if value is not None}
    if "checkpoint" in wanted:
        wanted["checkpoint"] = absolute_file(wanted["checkpoint"])
        if wanted.setdefault("calculator", "mattersim") != "mattersim":
            raise InputError("--calculator, --checkpoint: give one of the two")
    asked, there = (str(one.get("calculator", "")) for one in (wanted, block))
    same = not (asked and there) or (import_path(asked) or asked) == (import_path(there) or there)
    return parse_settings(
        {
            "seed": 0,
            **data,
            **{key: value for key, value in given.items() if value is not None},
            "fitness": ["SSCHA"],
            "main_calculator": {"calculator": "mattersim", **(block if same else {}), **wanted},
            "sscha": {
                **(data.get("sscha") or {}),
                **({"evaluator": None} if asked else {}),
                **{key: value for key, value in sscha.items() if value is not None},
            },
        }
    )
