"""Every structure type and mode of MAGUS with our calculator: what docs/magus.md says of each, and
whose energy a structure carries."""

import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from ase.io import read, write
from magus_run import magus, needs_magus, ours, write_input

from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.structures import fixed_atoms, stripped

pytestmark = needs_magus

NAIVE = {"Comparator": {"comparator_list": ["naive"]}}
SLAB = {
    "bulk_layernum": 2,
    "buffer_layernum": 1,
    "rcs_layernum": 1,
    "cutslices": 2,
    "direction": [1, 0, 0],
    "addH": False,
    "extra_c": 1.5,
}
OPEN = {
    **NAIVE,
    "cutoff": 1.6,
    "vacuum_thickness": 10,
    "d_ratio": 0.45,
    "volume_ratio": 4,
    "spacegroup": ["1-56"],
    "pressure": 0,
}
TYPES = {
    "bulk": {},
    "molMode": {
        "molMode": True,
        "symbols": ["H"],
        "inputMols": ["H2.xyz"],
        "formula": [2],
        "min_n_atoms": 4,
        "max_n_atoms": 8,
        "chkMol": True,
        "molDetector": 1,
        "volume_ratio": 5,
        "pressure": 50,
    },
    "layer": {
        "dimension": 2,
        "min_thickness": 1,
        "max_thickness": 3,
        "spg_type": "plane",
        "thickness_tolerance": 2,
        "vacuum_thickness": 8,
        "volume_ratio": 1.5,
        "spacegroup": ["2-17"],
        "min_n_atoms": 3,
        "pressure": 0,
    },
    "confined_1d": {
        "vacuum_thickness": 8,
        "add_sym": False,
        "randRatio": 1.0,
        "min_volume": 1,
        "max_volume": 10000,
        "min_lattice": [5, 5, 3, -1, -1, -1],
        "max_lattice": [7, 7, 9, -1, -1, -1],
        "min_n_atoms": 3,
        "pressure": 0,
    },
    "cluster": {**OPEN, "formula": [5], "min_n_atoms": 5, "max_n_atoms": 5},
    "surface": {
        **NAIVE,
        "add_sym": False,
        "vacuum_thickness": 10,
        "spg_type": "plane",
        "spacegroup": ["2-17"],
        "rcs_x": [2],
        "rcs_y": [1],
        "d_ratio": 0.5,
        "randRatio": 0.3,
        "randwalk_ratio": 1,
        "modification": {"clean": {"Si": [0]}},
        "min_n_atoms": 0,
        "max_n_atoms": 0,
        "slabinfo": {"bulk_file": "bulk.vasp", **SLAB},
        "pressure": 0,
    },
    "adclus": {
        **OPEN,
        "formula": [3],
        "min_n_atoms": 3,
        "max_n_atoms": 3,
        "substrate": "substrate.vasp",
        "size": [1, 1],
    },
    "confined_2d": {"vacuum_thickness": 8, "add_sym": False, "pressure": 0},
    "interface": {"slabinfo": {"bulk_a": "bulk.vasp", "bulk_b": "bulk.vasp"}},
}

WORKING = ("bulk", "molMode", "layer", "confined_1d", "cluster", "surface")
NO_SSCHA = sorted({*TYPES} - {"bulk", "molMode"})


def prepare(folder, kind, **changes):
    """An input of that type, static, of two rounds, with the files that the types read."""
    write(folder / "bulk.vasp", bulk("Al", cubic=True))
    write(folder / "substrate.vasp", fcc111("Al", (2, 2, 2), vacuum=6.0))
    write(folder / "H2.xyz", molecule("H2"))
    if kind == "interface":  # as MAGUS leaves it, and takes it: matching two crystals takes minutes
        (folder / "Ref").mkdir(exist_ok=True)
        write(folder / "Ref/layerslices.traj", [fcc111("Al", (1, 1, 2), vacuum=3.0)] * 4)
    named = {} if kind in ("bulk", "molMode") else {"structureType": kind}
    write_input(
        folder,
        **{
            "Fitness": ["Enthalpy"],
            "MainCalculator": ours(max_step=8, eps=0.01),
            **TYPES[kind],
            **named,
            **changes,
        },
    )
    if "sscha" not in changes:
        text = (folder / "input.yaml").read_text()
        block, end = text.index("sscha:\n"), text.index("structureType:")
        (folder / "input.yaml").write_text(text[:block] + text[end:])


@pytest.mark.parametrize("kind", WORKING)
def test_every_energy_is_that_of_the_structure_that_carries_it(work, tiny_checkpoint, kind):
    """The fault: of a slab with FixAtoms one structure was relaxed and half of it handed back, 3 eV
    from its energy."""
    prepare(
        work, kind, **({"Fitness": ["Enthalpy"]} if kind != "surface" else {"Fitness": ["Ercs"]})
    )
    result = magus(work, "search")
    assert result.returncode == 0, result.stdout[-3000:]
    from magus_anharmonic.potential import load

    potential, checked = load(tiny_checkpoint, device="cpu"), 0
    for file in sorted((work / "results").glob("*.traj")):
        frames = [atoms for atoms in read(file, ":") if "energy" in atoms.info]
        if not frames:
            continue
        found = potential.evaluate([stripped(atoms) for atoms in frames])
        for atoms, energy, forces in zip(frames, found.energy, found.forces, strict=True):
            assert atoms.info["energy"] == pytest.approx(energy, abs=1e-5), (
                file.name,
                atoms.info["identity"],
            )
            assert np.allclose(atoms.info["forces"], forces, atol=1e-4)
            assert fixed_atoms(atoms).any() == (kind == "surface")
        checked += len(frames)
    assert checked >= 8


def test_the_lower_half_of_every_slab_stays_where_magus_put_it(work):
    prepare(work, "surface", Fitness=["Ercs"], numGen=1)
    assert magus(work, "search").returncode == 0
    heights = set()
    for atoms in read(work / "results/raw1.traj", ":"):
        fixed = fixed_atoms(atoms)
        assert fixed.any() and not fixed.all()
        z = atoms.positions[fixed, 2]
        heights.add(tuple(np.round(np.diff(np.sort(z)), 6)))
    assert len(heights) == 1, "relaxed, every slab would have layers of its own"


@pytest.mark.parametrize("kind", NO_SSCHA)
def test_sscha_where_it_cannot_work_is_refused_before_any_work(work, kind):
    prepare(work, kind, Fitness=["SSCHA"], sscha={})
    result = magus(work, "search")
    assert (
        result.returncode == 2 and f"structureType: {kind}: SSCHA needs crystals" in result.stdout
    ), result.stdout[-2000:]
    assert "Traceback" not in result.stdout and not (work / "results").exists()


def test_an_interface_is_refused_before_magus_matches_its_crystals(work):
    """The fault: MAGUS matches the two crystals while it reads its input, for minutes, before there
    is a search that can be refused."""
    prepare(work, "interface", Fitness=["SSCHA"], sscha={})
    (work / "Ref/layerslices.traj").unlink()
    result = magus(work, "search")
    assert result.returncode == 2 and "structureType: interface: SSCHA needs" in result.stdout, (
        result.stdout[-2000:]
    )
    assert not any((work / "Ref").iterdir())


@pytest.mark.parametrize(
    ("kind", "words"), [("adclus", "zero-size array"), ("confined_2d", "bond_ratio")]
)
def test_types_that_fail_in_magus_itself_fail_with_its_own_calculator(work, kind, words):
    prepare(
        work,
        kind,
        Fitness=["Enthalpy"],
        MainCalculator={"calculator": "emt", "jobPrefix": "EMT", "max_step": 3},
    )
    result = magus(work, "search")
    assert result.returncode != 0 and words in result.stdout, (
        "if MAGUS has mended it, docs/magus.md can say so"
    )


QUICK = {
    "supercell": [1, 1, 1],
    "n_configs": 10,
    "max_populations": 1,
    "max_candidates": 1,
    "hessian": 0,
}


def test_a_molecular_search_goes_through_sscha_and_a_restart(work):
    """The fault: MAGUS puts molecules in the place of their files, and our record of the settings
    could not be written."""
    prepare(work, "molMode", Fitness=["SSCHA"], sscha=QUICK, **NAIVE)
    for options in ([], ["-r"]):
        result = magus(work, "search", *options)
        assert result.returncode == 0 and "Traceback" not in result.stdout, result.stdout[-3000:]
        assert (
            "ranking by free energy" in result.stdout
            and (work / "results/anharmonic/ranking.png").exists()
        )
    good = read(work / "results/good.traj", ":")
    assert any("gibbs" in atoms.info for atoms in good)
    assert all(len(atoms) % 4 == 0 for atoms in good)


def test_a_search_that_magus_ends_early_has_free_energies(work):
    """The fault: with learning they come in the last round, which ``convergence_condition`` never
    lets come."""
    learning = {
        "labeler": {"calculator": "ase.calculators.emt.EMT", "n_workers": 1},
        "n_sample": 1,
        "n_perturb": 2,
        "epochs": 1,
    }
    prepare(
        work,
        "bulk",
        Fitness=["SSCHA"],
        sscha=QUICK,
        learning=learning,
        numGen=5,
        convergence_condition=[-1, 1000.0],
        **NAIVE,
    )
    result = magus(work, "search")
    assert result.returncode == 0 and "which met the convergence_condition" in result.stdout, (
        result.stdout[-3000:]
    )
    assert "the search ended in round 1 of 5: its structures are ranked now" in result.stdout
    statuses = [atoms.info.get("status") for atoms in read(work / "results/good.traj", ":")]
    assert any(status not in (None, "static", "estimated") for status in statuses), statuses
    assert len(read(work / "results/best.traj", ":")) == 1
    assert (
        len({line["generation"] for line in read_jsonl(work / "results/anharmonic/metrics.jsonl")})
        == 1
    )


def test_the_miner_s_own_step_draws_the_same_numbers_again(work):
    """The fault: ``-smfr`` gives the search another step, around which ``seed`` did not reach."""
    found = []
    for _ in range(2):
        prepare(work, "bulk", frag_gen={}, spg_miner={}, formula=[4], min_n_atoms=4)
        result = magus(work, "search", "-smfr")
        assert result.returncode == 0, result.stdout[-3000:]
        found.append(
            [
                np.round(atoms.positions, 8).tolist()
                for atoms in read(work / "results/init2.traj", ":")
            ]
        )
        (work / "fragments_pool.xyz").unlink(missing_ok=True)
    assert found[0] == found[1]


def test_a_search_begun_without_our_keys_is_not_taken_over(work):
    """The fault: ``-r`` with our keys replaced the enthalpies of good.traj by those of another
    model."""
    prepare(work, "bulk", MainCalculator={"calculator": "emt", "jobPrefix": "EMT"})
    assert magus(work, "search").returncode == 0
    before = (work / "results/good.traj").read_bytes()
    prepare(work, "bulk")
    result = magus(work, "search", "-r")
    assert (
        result.returncode == 2
        and "was started without this package" in result.stdout
        and "Traceback" not in result.stdout
    )
    assert (work / "results/good.traj").read_bytes() == before


def test_r3m_and_im3m_are_one_for_magus_s_default_and_two_for_naive_alone(work, monkeypatch, h3s):
    """The fault: ``dE: 0.001`` was said to keep them apart; zurek, half of MAGUS's default, looks
    at neither energy nor symmetry."""
    monkeypatch.chdir(work)
    from magus.comparators import get_comparator
    from magus.populations.individuals import Individual

    from magus_anharmonic.plugins.modes import merges_near_phases

    monkeypatch.setattr(Individual, "symprec", 0.01, raising=False)
    monkeypatch.setattr(Individual, "check_seed", True, raising=False)
    monkeypatch.setattr(Individual, "full_ele", False, raising=False)
    phases = [Individual(h3s(shift=shift)) for shift in (0.0, 0.05)]
    for phase, energy in zip(phases, (-12.0, -11.9), strict=True):
        phase.find_spg()
        phase.info["energy"] = energy
    assert [phase.info["spg"] for phase in phases] == [229, 160]
    for keys, same in (({"dE": 0.001}, True), ({"dE": 0.001, **NAIVE}, False)):
        for phase in phases:
            phase.info.pop("compare_info", None)
        assert get_comparator({"symprec": 0.01, **keys}).looks_like(*phases) is same
        assert bool(merges_near_phases(keys)) is same


@pytest.mark.parametrize(
    ("more", "kept"),
    [({}, {160, 229}), ({"Comparator": {"comparator_list": ["naive", "zurek"]}}, {229})],
)
def test_a_search_by_free_energy_keeps_r3m_beside_im3m(work, h3s, more, kept):
    """The fault: with ``dE: 0.001`` alone MAGUS threw one of them away before SSCHA could tell them
    apart."""
    keys = {
        "symbols": ["H", "S"],
        "formula": [3, 1],
        "min_n_atoms": 4,
        "max_n_atoms": 4,
        "popSize": 1,
        "numGen": 1,
        "saveGood": 1,
        "symprec": 0.01,
    }
    prepare(
        work,
        "bulk",
        Fitness=["SSCHA"],
        sscha=QUICK,
        dE=0.001,
        MainCalculator=ours(max_step=1),
        **keys,
        **more,
    )
    (work / "Seeds").mkdir()
    write(work / "Seeds/seeds_1.traj", [h3s(), h3s(shift=0.05)])
    result = magus(work, "search")
    assert result.returncode == 0, result.stdout[-3000:]
    found = [
        atoms.info["spg"]
        for atoms in read(work / "results/gen1.traj", ":")
        if atoms.info.get("origin") == "seed"
    ]
    assert {*found} == kept
