"""MAGUS's keys in the embedded host: known, refused by name, or unknown with the nearest valid
one."""

import itertools

import numpy as np
import pytest

from magus_anharmonic.errors import InputError
from magus_anharmonic.search.keys import (
    MAGUS_ONLY,
    fold,
    keys_table,
    parse_host_keys,
    unknown_to_magus,
)
from magus_anharmonic.settings import parse_settings

BASE = {
    "formulaType": "fix",
    "symbols": ["H", "S"],
    "formula": [3, 1],
    "min_n_atoms": 4,
    "max_n_atoms": 12,
    "popSize": 10,
    "saveGood": 3,
    "numGen": 2,
    "MainCalculator": {"calculator": "emt", "jobPrefix": "EMT"},
}


def keys(**changes):
    return parse_host_keys(parse_settings({**BASE, **changes}))[0]


def problems(**changes):
    with pytest.raises(InputError) as error:
        keys(**changes)
    return error.value.problems


def test_defaults_are_those_of_magus():
    known = keys()
    assert (known.d_ratio, known.volume_ratio, known.rand_ratio, known.symprec, known.k) == (
        0.7,
        1.5,
        0.2,
        0.1,
        0.3,
    )
    assert (known.dE, known.dV, known.max_forces, known.max_enthalpy) == (0.01, 0.05, 50.0, 100.0)
    assert known.spacegroup == list(range(1, 231)) and known.add_sym and not known.check_seed


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("minNAtoms", 8, "min_n_atoms"),
        ("min_n_atoms", 8, "min_n_atoms"),
        ("pPri", 0.5, "p_pri"),
        ("dRatio", 0.6, "d_ratio"),
        ("volumeRatio", 3.0, "volume_ratio"),
        ("maxNTry", 7, "max_n_try"),
        ("rand_ratio", 0.4, "rand_ratio"),
        ("dE", 0.001, "dE"),
    ],
)
def test_camel_and_snake_case_mean_the_same(key, value, field):
    changed = {k: v for k, v in BASE.items() if fold(k) != field}
    assert getattr(parse_host_keys(parse_settings({**changed, key: value}))[0], field) == value


def test_a_key_in_both_spellings_is_refused():
    assert problems(minNAtoms=4) == ("minNAtoms: is given twice (camelCase and snake_case)",)


def test_an_unknown_key_is_refused_with_the_nearest_valid_one():
    assert problems(presure=150) == ("presure: unknown key; did you mean pressure?",)
    assert "did you mean d_ratio?" in problems(d_ratioo=1)[0]
    wrong = {
        "MainCalculater": "MainCalculator",
        "numgen": "numGen",
        "saveGod": "saveGood",
        "OfspringCreator": "OffspringCreator",
    }
    assert [
        line
        for key, right in wrong.items()
        if f"did you mean {right}?" not in (line := problems(**{key: 1})[0])
    ] == []


@pytest.mark.parametrize("name", sorted(MAGUS_ONLY - {"MLCalculator"}))
def test_every_key_that_only_magus_knows_is_named_and_refused(name):
    lines = problems(**{name: "something"})
    assert len(lines) == 1 and lines[0].startswith(f"{name}: only MAGUS knows this key")


def test_a_magus_key_that_asks_for_what_the_host_does_anyway_is_no_error():
    keys(molMode=False, structureType="bulk", eleSize=0, DFTRelax=False, autoOpRatio=False)
    assert "should be 'bulk'" in problems(structureType="layer")[0]


def test_keys_that_magus_never_reads_have_no_effect_and_are_named():
    known, warnings = parse_host_keys(parse_settings({**BASE, "volRatio": 5, "diffE": 1}))
    assert known.volume_ratio == 1.5 and known.dE == 0.01
    assert [line.split(":")[0] for line in warnings] == ["volRatio", "diffE"]


def test_space_groups_as_numbers_and_ranges():
    assert keys(spacegroup=[2, "5-7", 6, "225"]).spacegroup == [2, 5, 6, 7, 225]
    assert keys(spacegroup="2-230").spacegroup == list(range(2, 231))
    for wrong in (0, 231, "7-5", "P1", True, []):
        assert problems(spacegroup=wrong)[0].startswith("spacegroup:")


def test_compositions_are_those_of_a_direct_count():
    assert keys().atom_counts().tolist() == [[3, 1], [6, 2], [9, 3]]
    var = {"formulaType": "var", "formula": [[1, 0], [0, 1]], "min_n_atoms": 2, "max_n_atoms": 5}
    every = {(a, b) for a, b in itertools.product(range(6), repeat=2) if 2 <= a + b <= 5}
    assert {tuple(row) for row in keys(**var).atom_counts()} == {
        row for row in every if min(row) > 0
    }
    assert {tuple(row) for row in keys(**var, full_ele=False).atom_counts()} == every
    narrow = keys(**var, max_ratio=2).atom_counts()
    assert np.all(narrow.max(axis=1) <= 2 * narrow.min(axis=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"formula": [1, 2, 3]},
            "formula: [1, 2, 3]: must hold one number for each of the 2 symbols",
        ),
        ({"formula": "H3S"}, "formula: 'H3S': must be whole numbers"),
        ({"formula": [-1, 2]}, "formula:"),
        ({"formula": [[1, 0], [0, 1]]}, "formulaType: fix needs one list"),
        ({"formulaType": "var"}, "formulaType: var needs one list per unit"),
        ({"min_n_atoms": 5, "max_n_atoms": 7}, "no whole number of [3, 1] gives 5 to 7 atoms"),
        ({"min_n_atoms": 14}, "min_n_atoms: 14 is larger than max_n_atoms: 12"),
        ({"popSize": 0}, "popSize: 0"),
        ({"popSize": "ten"}, "popSize: 'ten'"),
        ({"randRatio": 1.5}, "randRatio: 1.5"),
        ({"radius": [0.3]}, "radius:"),
        (
            {"distance_matrix": [[1, 2], [3, 1]]},
            "distance_matrix: must be a symmetric 2 x 2 matrix",
        ),
        ({"min_lattice": [1, 2]}, "min_lattice:"),
        ({"OffspringCreator": {"slip": {}}}, "operator slip is known to MAGUS only"),
        (
            {"OffspringCreator": {"rattle": {"prob": 0.9}, "perm": {"prob": 0.9}}},
            "OffspringCreator: the probabilities sum to 1.8",
        ),
        (
            {"OffspringCreator": {"rattle": {"strenght": 1}}},
            "OffspringCreator.rattle.strenght: unknown key",
        ),
        ({"Fitness": ["Gap"]}, "Fitness: Gap: only MAGUS knows this fitness"),
        ({"Fitness": ["Entalpy"]}, "Fitness: Entalpy: unknown fitness"),
        ({"learning": {"labeler": {"calculator": "main"}}}, "main needs `magus search -m`"),
    ],
)
def test_wrong_values_are_named_with_key_and_reason(changes, message):
    assert any(message in line for line in problems(**changes)), problems(**changes)


@pytest.mark.parametrize(
    "name", ["symbols", "numGen", "MainCalculator", "popSize", "saveGood", "formula", "min_n_atoms"]
)
def test_what_must_be_given_is_named_when_missing(name):
    with pytest.raises(InputError, match=rf"(?m)^{name}: is missing"):
        parse_host_keys(parse_settings({key: value for key, value in BASE.items() if key != name}))


def test_all_problems_come_in_one_error():
    assert len(problems(presure=1, molMode=True, popSize=0)) == 3


def test_operator_probabilities_share_what_is_left():
    operators = keys(
        OffspringCreator={"rattle": {"prob": 0.4}, "lattice": {"prob": 0}, "perm": None}
    ).offspring_creator
    assert operators.probabilities(2) == pytest.approx(
        {"cutandsplice": 0.3, "lattice": 0.0, "rattle": 0.4, "perm": 0.3}
    )
    assert "perm" not in operators.probabilities(1)


def test_the_table_lists_every_known_key_and_names_the_refused_ones():
    table = keys_table()
    for name in (
        "popSize",
        "d_ratio",
        "spacegroup",
        "OffspringCreator.rattle",
        "MainCalculator",
        "molMode",
    ):
        assert name in table


def test_under_magus_only_keys_that_nobody_knows_are_reported():
    settings = parse_settings({**BASE, "molMode": True, "presure": 3, "volRatio": 2})
    assert unknown_to_magus(settings) == ["presure: unknown key; did you mean pressure?"]
