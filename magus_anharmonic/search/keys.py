"""MAGUS's own keys of ``input.yaml``, as far as the embedded host acts on them.

Names, defaults and meanings are those of MAGUS 2.0.1. A key that only MAGUS knows is named and
refused, never ignored; a key that MAGUS itself never reads is accepted and named in a warning.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings import (
    Count,
    Energy,
    Force,
    In,
    Length,
    NonNegative,
    Positive,
    Section,
    Settings,
    Symprec,
    nearest,
    parse,
    snake_case,
)

Probability = Annotated[float, Field(ge=0, le=1)]
SixNumbers = Annotated[list[float], Field(min_length=6, max_length=6)]

MAGUS_ONLY: frozenset[str] = frozenset(
    """
    Comparator DFTRelax DFTScf Fingerprint MLCalculator SelectDFTScf age_scale autoOpRatio
    autoRandomRatio auto_random_ratio best_match bondRatio bond_ratio buffer chkMol comparator
    convergence_condition dimension dist_clus2surface eleSize ele_size esangle_max esangle_min
    fixbulk forceMostGeneralWyckPos fp_calc generator_max_length_ratio good_ratio initNum inputMols
    input_mols kill_time matchTol match_order_index max_attempts max_thickness method minNum
    min_thickness mlRelax modification molDetector molMode mol_detector n_repair_try n_split
    num_para_calc num_para_generator poolSize presetLattice preset_spg_prob random_swap_axis
    randwalk_range randwalk_ratio rcs_formula rcs_x rcs_y refE set_lattice slabinfo slices_file
    spg_miner spg_type substrate symprec_in_generator targetGap targetXrd thickness_tolerance
    threshold_mol vacuum_thickness waveLength weighten wyckoff ANTISEED cutoff frag_gen frag_ratio
    mine_probabilities mol_formula remove_p1 size eps exe_cmd fix_symmetry fix_volume init_times
    job_prefix kpts mace_runner max_force max_move max_relax_epoch max_step mem_per_cpu memory
    min_dist mode mtp_runner num_core num_parallel optimizer pp_label pre_processing queue_name
    relax_lattice verbose wait_params wait_time xc LJ_A LJ_D LJ_W force_tolerance kmesh pot_file
    pp_dir ppDir scaled_by_force stress_tolerance xc_functional
    """.split()
)
"""Keys of MAGUS 2.0.1 (names as in its source) that the embedded host does not act on at the top
level of ``input.yaml``."""

MAGUS_ONLY_OPERATORS = frozenset(("replaceball", "soft", "ripple", "slip", "rotate", "formula"))

ACCEPTED_VALUES: dict[str, tuple[Any, ...]] = {
    "mol_mode": (False,),
    "dftrelax": (False,),
    "dftscf": (False,),
    "select_dftscf": (False,),
    "ml_relax": (False,),
    "chk_mol": (False,),
    "mol_detector": (0,),
    "ele_size": (0,),
    "dimension": (3,),
    "auto_op_ratio": (False,),
    "auto_random_ratio": (False,),
    "comparator": ({"comparator_list": ["naive"]},),
}
"""MAGUS-only keys (folded) whose given value asks for what the embedded host does anyway."""

WITHOUT_EFFECT: dict[str, str] = {
    "vol_ratio": "MAGUS reads volume_ratio",
    "diff_e": "MAGUS reads dE",
    "diff_v": "MAGUS reads dV",
    "chk_seed": "MAGUS reads check_seed",
    "good_size": "the good population always holds popSize structures",
    "mol_type": "inputMols and molMode say it",
    "full_eles": "MAGUS reads full_ele",
    "calc_type": "MainCalculator says it",
}
"""Keys (folded) that MAGUS 2.0.1 accepts and never reads; the host does the same and says so."""


class CutAndSplice(Section):
    """``OffspringCreator.cutandsplice``."""

    prob: float = Field(
        -1.0,
        le=1.0,
        description="probability of this operator; negative: an equal share of what is left",
    )


class Lattice(CutAndSplice):
    """``OffspringCreator.lattice``."""

    sigma: Positive = Field(0.1, description="standard deviation of the random strain")


class Rattle(CutAndSplice):
    """``OffspringCreator.rattle``."""

    p: Probability = Field(0.25, description="probability that an atom moves")
    rattle_range: Length = Field(1.0, description="longest displacement, Angstrom")


class Perm(CutAndSplice):
    """``OffspringCreator.perm``."""

    frac_swaps: Probability = Field(
        0.5, description="largest fraction of the atoms that change places"
    )


class Operators(Section):
    """``OffspringCreator``: operators by MAGUS's names, run by ase-ga."""

    cutandsplice: CutAndSplice = Field(
        CutAndSplice.model_validate({}), description="cut-and-splice crossover"
    )
    lattice: Lattice = Field(Lattice.model_validate({}), description="random strain")
    rattle: Rattle = Field(Rattle.model_validate({}), description="random displacements")
    perm: Perm = Field(
        Perm.model_validate({}), description="exchange of unlike atoms (two elements or more)"
    )

    @model_validator(mode="before")
    @classmethod
    def _only_magus(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name in data:
                if name in MAGUS_ONLY_OPERATORS:
                    raise ValueError(
                        f"operator {name} is known to MAGUS only; the embedded host has"
                        f" {', '.join(cls.model_fields)}"
                    )
            return {name: {} if block is None else block for name, block in data.items()}
        return data

    def probabilities(self, n_symbols: int) -> dict[str, float]:
        """Probability of each operator, summing to 1; ``perm`` needs two elements. Raises
        ``InputError``."""
        names = [name for name in type(self).model_fields if name != "perm" or n_symbols > 1]
        given = {name: getattr(self, name).prob for name in names}
        fixed = sum(value for value in given.values() if value > 0)
        free = [name for name, value in given.items() if value < 0]
        if fixed > 1 + 1e-9 or (fixed == 0 and not free):
            raise InputError(
                f"OffspringCreator: the probabilities sum to {fixed:g}; they must sum to at most 1"
                " and not all be 0"
            )
        rest = (1 - fixed) / len(free) if free else 0.0
        total = fixed + rest * len(free)
        return {name: (value if value >= 0 else rest) / total for name, value in given.items()}


class HostKeys(Section):
    """MAGUS's keys that the embedded host knows."""

    formula: list[int] | list[list[int]] = Field(
        description="atoms per formula unit, in the order of symbols; a list of lists for var"
    )
    min_n_atoms: Count = Field(description="fewest atoms in the cell")
    max_n_atoms: Count = Field(description="most atoms in the cell")
    pop_size: Count = Field(description="structures per generation")
    save_good: Count = Field(description="good structures that are kept as parents")
    init_size: Count | None = Field(
        None, description="structures of the first generation; left out: popSize"
    )
    structure_type: Literal["bulk"] = Field("bulk", description="the embedded host knows bulk only")
    spacegroup: list[int] = Field(
        list(range(1, 231)), description="numbers and ranges such as 5-10"
    )
    d_ratio: Positive = Field(0.7, description="shortest distance / sum of the two radii")
    distance_matrix: list[list[float]] | None = Field(
        None, description="shortest distances in Angstrom, instead of d_ratio"
    )
    radius: list[Positive] | None = Field(
        None, description="radii in Angstrom; left out: covalent radii"
    )
    volume_ratio: Positive = Field(
        1.5, description="cell volume / volume of the atoms' balls, adapted from generation 2 on"
    )
    min_volume_ratio: Positive = Field(0.5, description="smallest random volume / mean")
    max_volume_ratio: Positive = Field(1.5, description="largest random volume / mean")
    min_volume: float = Field(
        -1.0, description="smallest random volume, A^3; negative: from the ratios"
    )
    max_volume: float = Field(
        -1.0, description="largest random volume, A^3; negative: from the ratios"
    )
    min_lattice: SixNumbers = Field(
        [-1.0] * 6, description="a, b, c, angles; negative: 2 x the largest radius, 45 degrees"
    )
    max_lattice: SixNumbers = Field(
        [-1.0] * 6,
        description="a, b, c, angles; negative: 3 x the cube root of the volume, 135 degrees",
    )
    min_n_formula: list[int] | None = Field(None, description="fewest units of each formula")
    max_n_formula: list[int] | None = Field(None, description="most units of each formula")
    max_ratio: Positive = Field(1000.0, description="largest ratio of the units in one cell (var)")
    full_ele: bool = Field(True, description="every element must be there")
    p_pri: Probability = Field(
        0.0, description="probability that the atoms are counted in the primitive cell"
    )
    max_n_try: Count = Field(100, description="attempts for one random structure")
    max_length_ratio: Positive = Field(8.0, description="longest / shortest cell vector")
    max_forces: Force = Field(50.0, description="eV/A; structures above it are dropped")
    max_enthalpy: Annotated[float, In("eV/atom")] = Field(
        100.0, description="eV/atom; structures above it are dropped"
    )
    symprec: Symprec = Field(0.1, description="Angstrom, for finding space groups")
    dE: Energy = Field(
        0.01, description="eV/atom: duplicates (of one space group) differ less in enthalpy"
    )
    dV: Positive = Field(0.05, description="relative: duplicates differ less in volume")
    check_seed: bool = Field(False, description="check seeds like other structures")
    rand_ratio: Probability = Field(
        0.2, description="share of random structures from the second generation on"
    )
    n_cluster: Count | None = Field(
        None, description="clusters from which pairs of parents come; left out: saveGood"
    )
    add_sym: bool = Field(True, description="symmetrise parents first")
    history_punish: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="factor per use as parent"
    )
    choice_func: Literal["exp"] = Field(
        "exp", description="parents are drawn with exp(-k x number of better structures)"
    )
    k: NonNegative = Field(0.3, description="see choice_func")
    allow_self_cross: bool = Field(True, description="a structure may pair with itself")
    offspring_creator: Operators = Field(
        Operators.model_validate({}), description="operators, their probabilities and values"
    )

    @field_validator("spacegroup", mode="before")
    @classmethod
    def _ranges(cls, value: Any) -> list[int]:
        numbers: list[int] = []
        for item in value if isinstance(value, list) else [value]:
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(item))
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= first <= last <= 230:
                raise ValueError(
                    f"{item!r} is no space group; give numbers from 1 to 230 and ranges such as"
                    " 5-10"
                )
            numbers.extend(range(first, last + 1))
        if not numbers:
            raise ValueError("must hold at least one space group")
        return list(dict.fromkeys(numbers))

    @field_validator("formula", mode="before")
    @classmethod
    def _counts(cls, value: Any) -> Any:
        nested = (
            isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value)
        )
        rows = value if nested else [value]
        whole = all(
            isinstance(row, list)
            and any(row)
            and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in row)
            for row in rows
        )
        if not whole or len({len(row) for row in rows}) != 1:
            raise ValueError(
                "must be whole numbers, one per element, e.g. [3, 1]; for var one such list per"
                " unit"
            )
        return value

    @model_validator(mode="after")
    def _ordered(self) -> HostKeys:
        for low, high in (("min_n_atoms", "max_n_atoms"), ("min_volume_ratio", "max_volume_ratio")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}: {getattr(self, low)} is larger than {high}: {getattr(self, high)}"
                )
        if 0 < self.max_volume < self.min_volume:
            raise ValueError(
                f"min_volume: {self.min_volume:g} is larger than max_volume: {self.max_volume:g}"
            )
        return self

    @property
    def units(self) -> np.ndarray:
        """(n_units, n_symbols) atoms of each unit; one unit with ``formulaType: fix``."""
        return np.atleast_2d(np.array(self.formula, dtype=int))

    def atom_counts(self) -> np.ndarray:
        """(n, n_symbols): every composition of a cell that the keys allow, in a fixed order; may be
        empty."""
        units = self.units
        sizes = units.sum(axis=1)
        least = np.maximum(1 if self.full_ele else 0, self.min_n_formula or [0] * len(units))
        most = np.minimum(
            self.max_n_atoms // sizes, self.max_n_formula or [self.max_n_atoms] * len(units)
        )
        allowed = []
        for numbers in itertools.product(
            *(range(low, high + 1) for low, high in zip(least, most, strict=True))
        ):
            row = np.array(numbers)
            if not row.any() or not self.min_n_atoms <= row @ sizes <= self.max_n_atoms:
                continue
            if row.max() / row[row > 0].min() <= self.max_ratio:
                allowed.append(row @ units)
        return np.array(allowed, dtype=int).reshape(-1, units.shape[1])


def fold(key: str) -> str:
    """The field name of a MAGUS key in camelCase or snake_case; ``dE`` and ``dV`` stay."""
    known = {camel(name): name for name in HostKeys.model_fields}
    return key if key in HostKeys.model_fields else known.get(key, snake_case(key))


def parse_host_keys(settings: Settings) -> tuple[HostKeys, list[str]]:
    """The embedded host's keys and warnings about keys without effect.

    Raises
    ------
    InputError
        One line per problem: keys that only MAGUS knows, unknown keys with the nearest valid one,
        wrong values and combinations.
    """
    known: dict[str, Any] = {}
    problems: list[str] = []
    warnings: list[str] = []
    for key, value in settings.host.items():
        name = fold(key)
        if name in HostKeys.model_fields:
            if name in known:
                problems.append(f"{key}: is given twice (camelCase and snake_case)")
            known[name] = {} if value is None and name == "offspring_creator" else value
        elif name in WITHOUT_EFFECT:
            warnings.append(f"{key}: has no effect: MAGUS never reads it; {WITHOUT_EFFECT[name]}")
        elif name in _ONLY_FOLDED:
            if value not in ACCEPTED_VALUES.get(name, ()):
                problems.append(
                    f"{key}: only MAGUS knows this key, the embedded host does not; take it out or"
                    " install MAGUS (`magus-anharmonic search --keys` lists what the embedded host"
                    " knows)"
                )
        else:
            problems.append(unknown_key(key))
    problems.extend(_top_level_problems(settings))
    try:
        keys = parse(HostKeys, known)
        problems.extend(_shape_problems(keys, settings))
    except InputError as error:
        problems.extend(_public(line) for line in error.problems)
    if problems:
        raise InputError(*problems)
    return keys, warnings


def unknown_key(key: str) -> str:
    """The message for a top-level key that neither we nor MAGUS know."""
    ours, host = (list(block.model_fields) for block in (Settings, HostKeys))
    hint = nearest(key, [*(n for n in ours if n != "host"), *host, *map(camel, host)])
    for name, public in PUBLIC.items():
        hint = hint.replace(f"mean {name}?", f"mean {public}?")
    return f"{key}: unknown key{hint}"


def unknown_to_magus(settings: Settings) -> list[str]:
    """One message for each top-level key that MAGUS does not know either (another plug-in may; a
    likely typing error all the same)."""
    known = {*HostKeys.model_fields, *WITHOUT_EFFECT, *_ONLY_FOLDED}
    return [unknown_key(key) for key in settings.host if fold(key) not in known]


def keys_table() -> str:
    """One line per key of MAGUS that the embedded host knows: name, default, meaning; then what is
    refused."""
    ours = ("symbols", "formula_type", "pressure", "fitness", "num_gen", "main_calculator")
    fields = {name: Settings.model_fields[name] for name in ours} | HostKeys.model_fields
    rows = [("key", "default", "meaning")]
    for name, field in fields.items():
        default = "1-230" if name == "spacegroup" else _shown(field)
        rows.append((PUBLIC.get(name, name), default, field.description or ""))
    for name, field in Operators.model_fields.items():
        values = ", ".join(type(field.default).model_fields)
        rows.append((f"OffspringCreator.{name}", values, field.description or ""))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{name:<{first}}  {default:<{second}}  {meaning}" for name, default, meaning in rows]
    only = ", ".join(sorted(sorted(MAGUS_ONLY), key=str.lower))
    return "\n".join([*lines, "", f"Known to MAGUS only, refused by the embedded host: {only}"])


PUBLIC: dict[str, str] = {
    "fitness": "Fitness",
    "main_calculator": "MainCalculator",
    "ml_calculator": "MLCalculator",
    "num_gen": "numGen",
    "formula_type": "formulaType",
    "offspring_creator": "OffspringCreator",
    "pop_size": "popSize",
    "save_good": "saveGood",
    "init_size": "initSize",
    "rand_ratio": "randRatio",
    "structure_type": "structureType",
}


def _shown(field: Any) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, list) and set(default) == {-1.0}:
        return "-1 (each)"
    return "" if default in (None, {}, []) or isinstance(default, Section) else str(default)


def _public(line: str) -> str:
    """The line with the key in MAGUS's own spelling: ``offspring_creator.rattle: ...`` ->
    ``OffspringCreator.rattle: ...``."""
    name = re.split(r"\W", line, maxsplit=1)[0]
    return PUBLIC.get(name, name) + line[len(name) :]


def camel(name: str) -> str:
    """``pop_size`` -> ``popSize``."""
    return re.sub(r"_([a-z])", lambda match: match[1].upper(), name)


_ONLY_FOLDED = frozenset(snake_case(name) for name in MAGUS_ONLY)


def _top_level_problems(settings: Settings) -> list[str]:
    from magus_anharmonic.ranking.fitness import EMBEDDED_FITNESSES, third_party_fitness

    problems = []
    if not settings.symbols:
        problems.append("symbols: is missing (the elements)")
    if settings.num_gen is None:
        problems.append("numGen: is missing (the number of generations)")
    if not settings.main_calculator and not settings.ml_calculator:
        problems.append(
            "MainCalculator: is missing (e.g. {calculator: mattersim, jobPrefix: MatterSim})"
        )
    for name in settings.fitness:
        if name not in EMBEDDED_FITNESSES:
            try:
                third_party_fitness(name)
            except InputError as error:
                problems += error.problems
    if settings.learning is not None and settings.learning.labeler.calculator == "main":
        problems.append(
            "learning.labeler.calculator: main needs `magus search -m`; the embedded host takes"
            " gpaw, vasp or espresso"
        )
    return problems


def _shape_problems(keys: HostKeys, settings: Settings) -> list[str]:
    problems = []
    n, several = len(settings.symbols), settings.formula_type == "var"
    if isinstance(keys.formula[0], list) != several:
        shape = "one list per unit, e.g. [[1, 0], [0, 1]]" if several else "one list, e.g. [3, 1]"
        problems.append(
            f"formula: {keys.formula}: formulaType: {settings.formula_type} needs {shape}"
        )
    elif keys.units.shape[1] != n:
        problems.append(
            f"formula: {keys.formula}: must hold one number for each of the {n} symbols"
        )
    for name in ("min_n_formula", "max_n_formula"):
        value = getattr(keys, name)
        if value is not None and len(value) != len(keys.units):
            problems.append(
                f"{name}: {value}: must hold one number for each of the {len(keys.units)} formulas"
            )
    if keys.radius is not None and len(keys.radius) != n:
        problems.append(f"radius: {keys.radius}: must hold one number for each of the {n} symbols")
    matrix = keys.distance_matrix
    if matrix is not None and (
        any(len(row) != len(matrix) for row in matrix)
        or len(matrix) != n
        or (np.array(matrix) != np.array(matrix).T).any()
    ):
        problems.append(f"distance_matrix: must be a symmetric {n} x {n} matrix in Angstrom")
    if not problems and len(keys.atom_counts()) == 0:
        problems.append(
            f"formula: no whole number of {keys.formula} gives {keys.min_n_atoms} to"
            f" {keys.max_n_atoms} atoms (min_n_atoms, max_n_atoms)"
        )
    try:
        keys.offspring_creator.probabilities(n)
    except InputError as error:
        problems.extend(error.problems)
    return problems
