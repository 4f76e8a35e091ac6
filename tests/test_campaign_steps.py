"""The steps of a campaign on small systems with known answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from campaign_inputs import write_campaign
from campaign_tables import read_rows

from magus_anharmonic.campaign import learning, modes, production, structures
from magus_anharmonic.campaign import run as driver
from magus_anharmonic.campaign.production import _read_relaxed
from magus_anharmonic.campaign.steps import (
    Context,
    Step,
    assemble,
    plan,
    structure_file,
    write_part,
)
from magus_anharmonic.campaign.structures import (
    Found,
    Phase,
    enthalpy_row,
    lowest_distinct,
    n_relaxed,
    phase_name,
    relaxed_structures,
)
from magus_anharmonic.errors import DamagedFile, InputError, MagusAnharmonicError
from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.learning.dataset import LabelStore
from magus_anharmonic.paper import ensemble_errors
from magus_anharmonic.paper.tables import FailureRow, LearningPoint
from magus_anharmonic.ranking.candidate import Candidate, write_ranking
from magus_anharmonic.settings.campaign import DftSettings, load_campaign
from magus_anharmonic.sscha.phonons import Level, levels_by_irrep, lowest_levels
from magus_anharmonic.sscha.record import FreeEnergy
from magus_anharmonic.structures import space_group, structure_id
from magus_anharmonic.units import EV_IN_CM1

H3s = Callable[..., Atoms]


def context_of(folder, **changes):
    return Context(load_campaign(write_campaign(folder, **changes)), folder / "campaign")


# irreducible representations


def symmetric_matrix(atoms, seed=0):
    """A random dynamical matrix at Gamma with the symmetry of the crystal."""
    from magus_anharmonic.sscha.phonons import _representation
    from magus_anharmonic.sscha.symmetry import Symmetry

    random = np.random.default_rng(seed).normal(size=(3 * len(atoms),) * 2)
    operations = _representation(Symmetry(atoms, (1, 1, 1)))
    return np.mean([g @ (random + random.T) @ g.T for g in operations], axis=0)


def counted(atoms):
    found = [level.irrep for level in levels_by_irrep(symmetric_matrix(atoms), atoms)]
    return {name: found.count(name) for name in found}


def test_optical_modes_at_gamma_are_those_of_the_tables(h3s):
    """Known decompositions: Im-3m H3S 2 T1u + T2u, R3m H3S 3 A1 + A2 + 4 E less A1 + E of the
    translations; NaCl, diamond, wurtzite."""
    assert counted(h3s()) == {"T1u": 2, "T2u": 1}
    assert counted(h3s(shift=0.1)) == {"A1": 2, "A2": 1, "E": 3}
    assert counted(bulk("NaCl", "rocksalt", a=5.64)) == {"T1u": 1}
    assert counted(bulk("Si")) == {"T2g": 1}
    assert counted(bulk("ZnO", "wurtzite", a=3.25, c=5.2)) == {
        "A1": 1,
        "B1": 2,
        "E1": 1,
        "E2": 2,
    } or counted(bulk("ZnO", "wurtzite", a=3.25, c=5.2)) == {"A1": 1, "B2": 2, "E1": 1, "E2": 2}


def test_levels_do_not_depend_on_orientation_or_order_of_atoms(h3s):
    atoms = h3s()
    matrix = symmetric_matrix(atoms)
    before = [(level.irrep, level.square) for level in levels_by_irrep(matrix, atoms)]
    turned, order = atoms.copy(), [2, 0, 3, 1]
    turned.rotate(33, (1, 2, 3), rotate_cell=True)
    axis = np.array([1, 2, 3]) / np.sqrt(14)
    angle = np.deg2rad(33)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    np.testing.assert_allclose(turned.positions, atoms.positions @ rotation.T, atol=1e-10)
    blocks = np.einsum(
        "ij,ajbk,lk->aibl", rotation, matrix.reshape(4, 3, 4, 3), rotation, optimize=True
    )
    blocks = blocks[np.ix_(order, range(3), order, range(3))].reshape(12, 12)
    after = [(level.irrep, level.square) for level in levels_by_irrep(blocks, turned[order])]
    assert [name for name, _ in after] == [name for name, _ in before]
    np.testing.assert_allclose([s for _, s in after], [s for _, s in before], atol=1e-8)


def test_t1u_is_the_block_that_is_written_down_by_hand(h3s):
    """S and H displaced along z couple in one 3x3 block: its two optical eigenvalues are the T1u
    levels."""
    atoms = h3s()
    raw = symmetric_matrix(atoms, seed=4).reshape(4, 3, 4, 3)
    masses = atoms.get_masses()
    along_z = np.zeros((12, 3))
    along_z[2, 0] = 1.0
    along_z[3 * 3 + 2, 1] = 1.0
    along_z[3 * 1 + 2, 2] = along_z[3 * 2 + 2, 2] = np.sqrt(0.5)
    still = np.kron(np.sqrt(masses / masses.sum())[:, None], np.eye(3))
    free = np.eye(12) - still @ still.T
    block = along_z.T @ free @ raw.reshape(12, 12) @ free @ along_z
    optical = sorted(np.linalg.eigvalsh(block), key=abs)[1:]
    found = [
        level.square
        for level in levels_by_irrep(raw.reshape(12, 12), atoms)
        if level.irrep == "T1u"
    ]
    np.testing.assert_allclose(sorted(found), sorted(optical), atol=1e-8)


def test_the_lowest_level_of_a_representation_is_followed_and_an_absent_one_refused():
    levels = [
        Level("T1u", 3.0, np.zeros((0, 0))),
        Level("T1u", -1.0, np.zeros((0, 0))),
        Level("T2u", 2.0, np.zeros((0, 0))),
    ]
    assert [level.square for level in lowest_levels(levels, ["T1u"])] == [-1.0]
    assert [level.irrep for level in lowest_levels(levels, [])] == ["T1u", "T2u"]
    with pytest.raises(
        InputError, match="Eg: this phase has no such optical mode at Gamma; it has T1u, T2u"
    ):
        lowest_levels(levels, ["Eg"])


def test_the_error_of_a_level_is_that_of_the_eigenvectors_it_is_made_of(h3s):
    vectors = np.eye(12)
    errors = np.full((1, 12), 5.0e-5)
    errors[0, 3:6] = 2.0e-5
    found = SimpleNamespace(errors=errors, vectors=vectors[None])
    level = Level("T1u", 1.0, vectors[:, 3:6])
    assert modes.square_error(found, level) == pytest.approx(2.0e-5 * EV_IN_CM1**2)
    assert modes.square_error(SimpleNamespace(errors=None, vectors=vectors[None]), level) is None


def test_harmonic_levels_are_the_curvature_of_the_energy(h3s):
    """Frozen T1u displacements of a Morse crystal: second difference of the energy against the
    level."""
    atoms = h3s(3.0)
    evaluator = CalculatorEvaluator(
        MorsePotential(epsilon=1.0, rho0=3.0, r0=1.5, rcut1=3.2, rcut2=4.1)
    )
    level = lowest_levels(modes.harmonic_levels(atoms, evaluator), ["T1u"])[0]
    direction = (level.vectors[:, 0] / np.sqrt(np.repeat(atoms.get_masses(), 3))).reshape(-1, 3)
    step = 0.01
    moved = [atoms.copy() for _ in range(3)]
    for factor, structure in zip((-step, 0.0, step), moved, strict=True):
        structure.positions += factor * direction
    minus, middle, plus = evaluator.evaluate(moved).energy
    assert level.square == pytest.approx((plus + minus - 2 * middle) / step**2, rel=5e-3)


def test_no_more_displacements_are_evaluated_than_symmetry_asks_for(h3s):
    from magus_anharmonic.sscha.start import CountingEvaluator

    for atoms, expected in ((h3s(), 2), (h3s(shift=0.05), 6)):
        evaluator = CountingEvaluator(
            CalculatorEvaluator(MorsePotential(epsilon=1.0, rho0=3.0, r0=1.5, rcut1=3.2, rcut2=4.1))
        )
        modes.harmonic_levels(atoms, evaluator)
        assert evaluator.count == expected


def label(atoms, name, parent, settings_hash="aaaa"):
    frame = atoms.copy()
    frame.info = {"id": name, "generation": 1, "parent": parent, "settings_hash": settings_hash}
    frame.calc = SinglePointCalculator(
        frame, energy=-1.0 * len(atoms), forces=np.zeros((len(atoms), 3)), stress=np.zeros(6)
    )
    return frame


def store_of(folder, parents, n=4, settings_hash="aaaa"):
    """A search's labels: ``n`` distortions of every parent."""
    store = LabelStore(folder / "results" / "anharmonic" / "labels")
    rng = np.random.default_rng(len(parents))
    for name, parent in parents.items():
        store.families.family(name, parent)
        for number in range(n):
            moved = parent.copy()
            moved.positions += rng.normal(scale=0.02, size=moved.positions.shape)
            store.add(label(moved, f"{name}-{number}", name, settings_hash))
    store.close_batch(1)


def crystals(n):
    """Different phases."""
    rng = np.random.default_rng(8)
    return {
        f"p-{i}": Atoms(
            "SH3",
            scaled_positions=rng.random((4, 3)),
            cell=np.diag([2.2, 2.5, 2.8]) + 0.3 * rng.random((3, 3)),
            pbc=True,
        )
        for i in range(n)
    }


def merge_step(context):
    return next(step for step in plan(context.settings) if step.id == "merge")


def test_merged_labels_of_one_phase_are_on_one_side_even_when_two_searches_found_it(tmp_path, h3s):
    context = context_of(tmp_path)
    shared = h3s(3.0)
    in_another_cell = shared.repeat((2, 1, 1))
    store_of(context.folder("learn-075GPa"), {"p-shared": shared, **crystals(6)})
    store_of(
        context.folder("learn-125GPa"),
        {"p-other-name": in_another_cell, **dict(list(crystals(12).items())[6:])},
    )
    outcome = structures.merge(context, merge_step(context))
    frames = read(context.folder("merge") / structures.LABELS, ":")
    assert outcome.n_structures == len(frames) == 4 * 14
    sides = {}
    for atoms in frames:
        sides.setdefault(atoms.info["family"], set()).add(atoms.info["side"])
    assert all(len(found) == 1 for found in sides.values())
    families = {
        (atoms.info["step"], atoms.info["parent"]): atoms.info["family"] for atoms in frames
    }
    assert families["learn-075GPa", "p-shared"] == families["learn-125GPa", "p-other-name"]
    assert families["learn-075GPa", "p-0"] != families["learn-075GPa", "p-1"]
    counts = [
        sum(atoms.info["side"] == side for atoms in frames)
        for side in ("train", "validation", "test")
    ]
    assert counts[0] > 30 and min(counts) >= 4


def test_labels_of_two_dft_settings_are_not_merged(tmp_path):
    context = context_of(tmp_path)
    store_of(context.folder("learn-075GPa"), crystals(2))
    store_of(context.folder("learn-125GPa"), crystals(2), settings_hash="bbbb")
    with pytest.raises(
        InputError, match="two different DFT settings: aaaa in learn-075GPa, bbbb in learn-125GPa"
    ):
        structures.merge(context, merge_step(context))


def test_searches_without_labels_are_a_clear_failure(tmp_path):
    context = context_of(tmp_path)
    with pytest.raises(MagusAnharmonicError, match="no label in learn-075GPa, learn-125GPa"):
        structures.merge(context, merge_step(context))


def test_sides_follow_the_split_by_whole_families_and_leave_no_side_empty():
    labels = [f"family-{i}" for i in range(40) for _ in range(10)]
    sides = structures.sides_of_families(labels, (8, 1, 1))
    shares = {
        side: sum(10 for found in sides.values() if found == side)
        for side in ("train", "validation", "test")
    }
    assert shares == {"train": 320, "validation": 40, "test": 40}
    few = structures.sides_of_families(["a"] * 50 + ["b"] * 3 + ["c"] * 3, (8, 1, 1))
    assert few["a"] == "train" and sorted(few.values()) == ["test", "train", "validation"]
    assert set(
        structures.sides_of_families(
            ["a", "b", "c", "d"], (8, 1, 1), dict.fromkeys("abcd", "train")
        ).values()
    ) == {"train"}
    assert "test" not in structures.sides_of_families(labels, (9, 1, 0)).values()


# structures that searches left


def search_folder(folder, structures):
    (folder / "results").mkdir(parents=True)
    for generation, population in enumerate(structures, start=1):
        frames = []
        for atoms, enthalpy in population:
            frame = atoms.copy()
            frame.info = {"enthalpy": enthalpy, "n_evaluations": 7}
            frames.append(frame)
        write(folder / f"results/gen{generation}.traj", frames)
        write(folder / f"results/raw{generation}.traj", frames)
    write(folder / "results/good.traj", frames)
    return folder


def test_every_structure_of_a_search_is_read_once_and_the_lowest_distinct_are_kept(tmp_path, h3s):
    a, b, c = h3s(3.0), h3s(3.1, 0.1), h3s(3.2, 0.15)
    same = a.repeat((1, 1, 2))
    folder = search_folder(
        tmp_path, [[(a, -3.0), (b, -2.0)], [(a, -3.0), (same, -2.9999), (c, -1.0)], [(b, np.nan)]]
    )
    found = list(relaxed_structures(folder, "produce-100GPa"))
    assert [item.enthalpy for item in found] == [-3.0, -2.0, -2.9999, -1.0]
    assert [item.enthalpy for item in lowest_distinct(found, 2)] == [-3.0, -2.0]
    assert [item.enthalpy for item in lowest_distinct(found, 9)] == [-3.0, -2.0, -1.0]
    assert [item.enthalpy for item in lowest_distinct(found, 9, window=1.5)] == [-3.0, -2.0]
    assert n_relaxed(folder) == (6, 42)


def test_phases_are_recognised_by_space_group_and_size_of_the_primitive_cell(h3s):
    cubic, trigonal = h3s(), h3s(shift=0.1)
    phases = [Phase("Im-3m", 229, 4, cubic), Phase("any-R3m", 160, None, None)]
    assert (
        phase_name(phases, cubic.repeat((2, 1, 1)), space_group(cubic.repeat((2, 1, 1)))) == "Im-3m"
    )
    assert phase_name(phases, trigonal, space_group(trigonal)) == "any-R3m"
    assert phase_name(phases, bulk("Fe"), space_group(bulk("Fe"))) == "", "bcc iron has one atom"
    row = enthalpy_row(Found(cubic, -1.5, "x"), phases, 150, "m", "produce")
    assert (row.phase, row.formula, row.natoms) == ("Im-3m", "H3S", 4)
    assert (row.space_group, row.pressure_GPa) == ("Im-3m (229)", 150.0)
    assert row.volume_A3_per_atom == pytest.approx(cubic.get_volume() / 4)


def test_a_finished_search_is_not_repeated_and_one_with_another_input_or_model_starts_anew(
    tmp_path, monkeypatch
):
    context = context_of(tmp_path)
    restarts = []

    def run(settings, folder, restart):
        restarts.append(restart)
        (folder / "results" / "anharmonic").mkdir(parents=True, exist_ok=True)
        (folder / "results" / "anharmonic" / "run.json").touch()
        if len(restarts) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("magus_anharmonic.search.host.run", run)
    checkpoint = tmp_path / "final.pth"
    checkpoint.write_text("weights")
    folder = context.folder("produce-100GPa")

    def search(pressure=100):
        learning.search(
            context, folder, context.settings.production_search(pressure, str(checkpoint))
        )

    with pytest.raises(KeyboardInterrupt):
        search()
    search()
    search()
    assert restarts == [False, True], "it goes on after a kill, and is left alone when finished"
    (folder / "identity.json").write_text('{"input": {')
    search()
    search()
    assert restarts.pop() and restarts == [False, True], (
        "what it was started with is in its input, and it goes on"
    )
    assert (folder / "identity.json.damaged").is_file()
    checkpoint.write_text("other weights")
    search()
    search(50)
    assert restarts == [False, True, False, False]
    assert len(list((context.root / "superseded").iterdir())) == 2


def test_a_lost_name_of_the_run_behind_the_modes_fails_its_step_alone_and_says_how_to_make_it_anew(
    tmp_path,
):
    for content in ('{"run": "a', '{"run": 3}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(MagusAnharmonicError, match="--only hessian") as found:
            modes.run_of_record(tmp_path)
        assert not isinstance(found.value, InputError), "this would end the campaign"


def test_relaxed_structures_that_are_cut_are_relaxed_again(tmp_path):
    file = tmp_path / "found.traj"
    frame = bulk("Cu")
    frame.info = {"enthalpy": 1.0, "n_steps": 3, "failed": False, "reason": ""}
    write(file, [frame, frame])
    assert len(_read_relaxed(file, 2)) == 2
    write(file, [frame])
    with pytest.raises(DamagedFile, match="1 of 2"):
        _read_relaxed(file, 2)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DamagedFile):
        _read_relaxed(file, 1)


# the check by DFT


class Dft:
    """A labeler that keeps every structure, or moves the hydrogens of R3m to the bond centres;
    counts what it was asked."""

    settings_hash, n_workers = "dft1", 2

    def __init__(self, change=None):
        self.asked: list[Atoms] = []
        self.change = change

    def relax(self, structures, pressure, **options):
        self.asked += structures
        return [
            SimpleNamespace(
                atoms=self.change(atoms) if self.change else atoms,
                enthalpy=-2.0,
                converged=True,
                n_steps=5,
                reason="",
                failed=False,
            )
            for atoms in structures
        ]

    def close(self):
        """Nothing to end."""


def ranked(context, rows):
    folder = context.folder("sscha-100GPa")
    with structure_file(folder) as file:
        for atoms, static, _ in rows:
            file.add(atoms, structure_id(atoms), static, 100.0, "static")
            file.add(atoms, structure_id(atoms), static, 100.0, "centroids")
    write_ranking(
        folder / "ranking.csv",
        [
            Candidate(
                id=structure_id(atoms),
                atoms=atoms,
                pressure=100.0,
                spg_static=static,
                free_energy=FreeEnergy(status="converged", gibbs=-1.0, space_group=found),
            )
            for atoms, static, found in rows
        ],
    )


def test_only_candidates_that_changed_their_space_group_are_relaxed_by_dft(
    tmp_path, h3s, monkeypatch
):
    context = context_of(tmp_path)
    changed, kept = h3s(3.1, 0.1), h3s()
    ranked(context, [(changed, "R3m (160)", "Im-3m (229)"), (kept, "Im-3m (229)", "Im-3m (229)")])
    labeler = Dft()
    monkeypatch.setattr("magus_anharmonic.campaign.steps.get_labeler", lambda *_: labeler)
    step = next(step for step in plan(context.settings) if step.id == "dft")
    outcome = production.dft(context, step)
    (row,) = read_rows(context.folder("dft") / "tables" / "space_groups.csv")
    assert (row["id"], row["spg_static"], row["spg_dft"], row["spg_quantum"]) == (
        structure_id(changed), "R3m (160)", "R3m (160)", "Im-3m (229)",
    )  # fmt: skip
    assert outcome.n_labels == 6 and len(labeler.asked) == 1
    again = production.dft(context, step)
    assert len(labeler.asked) == 1 and again.n_labels == 6, "a finished relaxation is not repeated"


def test_a_relaxation_by_dft_that_fails_is_in_the_table_with_its_reason(tmp_path, h3s):
    class Failing(Dft):
        def relax(self, structures, pressure, **options):
            return [
                SimpleNamespace(
                    atoms=a,
                    enthalpy=np.nan,
                    converged=False,
                    n_steps=0,
                    reason="SCF did not converge",
                    failed=True,
                )
                for a in structures
            ]

    (record,) = production.relaxed_by_dft(
        Failing(), [h3s()], 100.0, tmp_path / "relaxed.jsonl", DftSettings()
    )
    assert (
        record["failed"]
        and record["space_group"] == ""
        and record["enthalpy"] is None
        and record["reason"] == "SCF did not converge"
    )


# tables, hooks


def test_tables_are_the_parts_of_finished_steps_one_after_the_other(tmp_path, h3s):
    for number, name in enumerate(("one", "two")):
        rows = [FailureRow(name, f"s{number}", 'a, "b"'), FailureRow(name, "s9", "")]
        write_part(tmp_path / name, FailureRow, rows)
        with structure_file(tmp_path / name) as file:
            file.add(h3s(3.0 + number), f"s{number}", "Im-3m (229)", 100, "static")
    target = tmp_path / "tables"
    target.mkdir()
    (target / "modes.csv").write_text("of a step that is no longer done")
    assemble(target, [tmp_path / "one", tmp_path / "two"])
    assert [row["id"] for row in read_rows(target / "failures.csv")] == ["s0", "s9", "s1", "s9"]
    assert next(read_rows(target / "failures.csv"))["reason"] == 'a, "b"'
    frames = read(target / "structures.extxyz", ":")
    assert [
        (a.info["id"], a.info["space_group"], a.info["pressure_GPa"], a.info["kind"])
        for a in frames
    ] == [("s0", "Im-3m (229)", 100.0, "static"), ("s1", "Im-3m (229)", 100.0, "static")]
    assert not (target / "modes.csv").exists()


def test_the_step_of_gradient_errors_gives_the_ensembles_of_the_hessians_to_the_analysis(
    tmp_path, monkeypatch
):
    context = context_of(
        tmp_path, errors={"phases": ["Im-3m"], "pressures": [100, 150], "n_configs": 60}
    )
    monkeypatch.setattr(Context, "final_model", SimpleNamespace(model_id="0123"))
    asked = []

    def measure(source, model, labeler, folder, **options):
        asked.append((source, options))
        folder.mkdir(parents=True)
        (folder / "gradient_errors.csv").write_text(f"phase,rmse\n{source[1]},{len(asked)}\n")

    monkeypatch.setattr(ensemble_errors, "measure_errors", measure)
    monkeypatch.setattr(ensemble_errors, "source_of_result", lambda *found: found)
    monkeypatch.setattr("magus_anharmonic.sscha.result.SschaResult.read", lambda folder: folder)
    step = next(step for step in plan(context.settings) if step.id == "errors")
    hessians = tmp_path / "campaign/hessian"
    with pytest.raises(MagusAnharmonicError, match="has no SSCHA run of Im-3m-100GPa"):
        modes.errors(context, step)
    for pressure in (100, 150):
        (hessians / f"Im-3m-{pressure}GPa").mkdir(parents=True)
        (hessians / f"Im-3m-{pressure}GPa" / modes.RUN_OF_RECORD).write_text(
            '{"run": "sscha-0123"}'
        )
    assert modes.errors(context, step).n_labels == 2 * 61
    assert [source for source, _ in asked] == [
        (hessians / "Im-3m-100GPa/sscha-0123", "Im-3m"),
        (hessians / "Im-3m-150GPa/sscha-0123", "Im-3m"),
    ]
    assert asked[0][1] == {"n_configs": 60, "seed": 3}
    rows = list(read_rows(context.folder("errors") / "tables/gradient_errors.csv"))
    assert [row["rmse"] for row in rows] == ["1", "2"]


def test_the_last_step_writes_the_report_and_draws_every_figure_once(tmp_path, monkeypatch):
    from magus_anharmonic.paper import script

    figures = script("figures")

    context = context_of(tmp_path)
    point = LearningPoint("learn", 1, "0123", "validation", 0.01, 0.1, 1.0, 8)
    write_part(context.root, LearningPoint, [point])
    asked = []
    draw = figures.make_figures
    monkeypatch.setattr(
        figures, "make_figures", lambda folder: asked.append(Path(folder)) or draw(folder)
    )
    assert driver.report(context, Step("report", "report")).output == "1 figures"
    assert asked == [context.root] and (context.root / "figures/learning.png").is_file()
    assert "Errors of the models while they learn" in (context.root / "report.html").read_text(
        encoding="utf-8"
    )
