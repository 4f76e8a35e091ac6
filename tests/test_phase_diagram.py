"""The phase diagram as a whole: real SSCHA on a grid (stored, resumed, chained), tables, words,
picture, and wrong input."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from crystal_models import Crystals, crystal
from ranking_fakes import Emt
from records import csv_rows
from two_phases import HIGH, LOW, Phase, boundary, changed, data
from typer.testing import CliRunner

from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.hull import hull_entries
from magus_anharmonic.phase_diagram.diagram import phase_diagram, sentences
from magus_anharmonic.phase_diagram.figures import write_diagram
from magus_anharmonic.phase_diagram.grid import (
    collect_runs,
    point_folder,
    point_of,
    run_grid,
    run_locked,
)
from magus_anharmonic.phase_diagram.points import read_points, write_points
from magus_anharmonic.settings.phase_diagram import load_phase_diagram
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.ensemble import entropy
from magus_anharmonic.units import EV_PER_A3_IN_GPA

SOFT = crystal((3.0, 3.0, 3.0), 1.0, 0.25, -0.2, 1.0)
HARD = crystal((2.5, 2.5, 2.7), 1.2, 0.3, -0.2, 1.0, depth=0.05)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A real SSCHA grid: two crystals, two pressures, two temperatures, two isotopes; returns
    folder, settings, evaluator, points."""
    folder = tmp_path_factory.mktemp("grid")
    for name, one in (("soft", SOFT), ("hard", HARD)):
        one.atoms.write(folder / f"{name}.vasp", direct=True)
    (folder / "phase-diagram.yaml").write_text(
        yaml.safe_dump(
            {
                "phases": {"soft": "soft.vasp", "hard": {"structure": "hard.vasp"}},
                "pressures": [0, 4],
                "temperatures": [0, 300],
                "isotopes": {"LiH": {}, "LiD": {"H": 2.014}},
                "sscha": {"supercell": [1, 1, 1], "n_configs": 60, "max_populations": 6},
            },
            sort_keys=False,
        )
    )
    settings = load_phase_diagram(folder / "phase-diagram.yaml")
    evaluator = Crystals([SOFT, HARD])
    points = run_locked(settings, folder / "out", evaluator)
    return folder, settings, evaluator, points


@pytest.mark.slow
def test_the_grid_holds_every_point_and_its_volumes_and_entropies_fit_its_free_energies(grid):
    _, settings, _, points = grid
    assert len(points) == 2 * 2 * 2 * 2 and all(p.usable for p in points)
    assert {p.isotopes for p in points} == {"LiH", "LiD"}
    by_point = {(p.phase, p.isotopes, p.pressure_GPa, p.temperature_K): p for p in points}
    for phase in ("soft", "hard"):
        for isotopes in settings.isotopes:
            for t in (0.0, 300.0):
                a, b = by_point[phase, isotopes, 0.0, t], by_point[phase, isotopes, 4.0, t]
                mean = 0.5 * (a.volume + b.volume)
                rise, error = (
                    (b.raw - a.raw) / 4.0 * EV_PER_A3_IN_GPA,
                    math.hypot(a.error, b.error) / 4.0 * EV_PER_A3_IN_GPA,
                )
                assert rise == pytest.approx(mean, abs=4.0 * error + 0.02 * mean)
            a, b = (by_point[phase, isotopes, 0.0, t] for t in (0.0, 300.0))
            assert a.entropy == 0.0 < b.entropy and a.raw > b.raw
    heavy, light = (by_point["soft", name, 0.0, 0.0] for name in ("LiD", "LiH"))
    assert heavy.gibbs < light.gibbs, "heavier nuclei have less zero-point energy"
    assert heavy.volume < light.volume


ISOTOPES = {
    "phases": {"soft": "soft.vasp"},
    "pressures": [0, 4],
    "temperatures": [300],
    "isotopes": {"LiH": {}, "LiD": {"H": 2.014}},
    "sscha": {
        "supercell": [2, 2, 2],
        "n_configs": 60,
        "max_populations": 12,
        "reference_spacing": 0.1,
    },
}


def of_isotopes(folder, supercell):
    SOFT.atoms.write(folder / "soft.vasp", direct=True)
    keys = {**ISOTOPES, "sscha": {**ISOTOPES["sscha"], "supercell": [supercell] * 3}}
    (folder / "p.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return load_phase_diagram(folder / "p.yaml"), {"soft": SOFT.atoms}


@pytest.mark.parametrize(("supercell", "fewest", "most"), [(2, 0, 0), (3, 1, 2)])
def test_heavy_isotopes_cost_two_new_populations_and_none_where_the_light_ones_can_be_reweighted(
    supercell, fewest, most, tmp_path
):
    """ESS/N of 24 modes is above 0.2, of 81 below; what comes out is what a run from nothing
    gives (at one of the pressures)."""
    settings, structures = of_isotopes(tmp_path, supercell)
    points = run_grid(settings, structures, Crystals([SOFT]), tmp_path / "sscha")
    assert [(p.isotopes, p.status) for p in points] == [("LiH", "converged")] * 2 + [
        ("LiD", "converged")
    ] * 2
    for light, heavy in zip(points[:2], points[2:], strict=True):
        folder = point_folder(tmp_path / "sscha", "soft", "LiD", heavy.pressure_GPa, 300.0)
        n_populations = len(list(folder.glob("population_*.npz")))
        response = 12
        assert fewest <= n_populations <= most and heavy.free_energy.n_evaluations == (
            60 * n_populations + response if most else 0
        )
        assert heavy.gibbs < light.gibbs - 0.01
        assert heavy.entropy > light.entropy and heavy.entropy_error > 0
    anew = free_energy(
        SOFT.atoms,
        Crystals([SOFT]),
        heavy.pressure_GPa,
        300.0,
        (supercell,) * 3,
        n_configs=60,
        masses={"H": 2.014},
        seed=9,
        reference_spacing=0.1,
    )
    assert heavy.gibbs == pytest.approx(
        anew.gibbs, abs=4.0 * math.hypot(heavy.error, anew.gibbs_error) + 2e-4
    )
    assert point_of("soft", "LiD", anew, None, SOFT.atoms).status == "converged"
    assert heavy.entropy == pytest.approx(entropy(anew.state), abs=5.0 * heavy.entropy_error)


def test_isotopes_that_do_not_converge_are_an_upper_bound_and_say_so(tmp_path):
    settings, structures = of_isotopes(tmp_path, 2)
    starts = []

    def stubborn(atoms, evaluator, *, max_populations, masses, start, **options):
        assert max_populations == 12, "two are the rule, and no limit: at 60 GPa D3S needs more"
        starts.append(start)
        small = dict(
            supercell=(1, 1, 1),
            n_configs=20,
            directory=options["directory"],
            pressure=options["pressure"],
        )
        found = free_energy(
            atoms, evaluator, temperature=options["temperature"], masses=masses, **small
        )
        open_ = {"status": "unconverged", "reason": "not converged after 12 populations"}
        return found if masses is None else replace(found, **open_)

    points = run_grid(
        settings, structures, Crystals([SOFT]), tmp_path / "sscha", free_energy=stubborn
    )
    assert starts[2:] == [
        point_folder(tmp_path / "sscha", "soft", "LiH", pressure, 300.0) for pressure in (0.0, 4.0)
    ]
    assert [(p.status, p.usable, p.bound) for p in points] == [("converged", True, False)] * 2 + [
        ("unconverged", False, True)
    ] * 2
    assert any(
        "soft (LiD) did not converge at 4 GPa, 300 K (not converged after 12" in line
        for line in sentences(phase_diagram(points))
    )


@pytest.mark.slow
def test_neighbours_start_from_one_another_and_a_second_run_evaluates_nothing(grid):
    folder, settings, evaluator, points = grid
    chained = [
        p for p in points if (p.isotopes, p.pressure_GPa, p.temperature_K) != ("LiH", 0.0, 0.0)
    ]
    firsts = [p for p in points if p not in chained]
    for p in points:
        run = point_folder(
            folder / "out" / "sscha", p.phase, p.isotopes, p.pressure_GPa, p.temperature_K
        )
        stored = json.loads((run / "settings.json").read_text())
        assert (stored["start"] is None) == (p in firsts)
    before = evaluator.n_structures
    assert run_locked(settings, folder / "out", evaluator) == points
    assert evaluator.n_structures == before
    assert read_points(folder / "out" / "gibbs.csv") == collect_runs(folder / "out")


@pytest.mark.slow
def test_a_folder_of_other_runs_is_refused_and_finished_runs_are_collected(grid):
    folder, settings, evaluator, points = grid
    with pytest.raises(InputError, match="another SSCHA run"):
        run_locked(settings.model_copy(update={"seed": 5}), folder / "out", evaluator)
    collected = collect_runs(folder / "out" / "sscha")
    assert {p.isotopes for p in collected} == {"natural", "H=2.014"} and len(collected) == len(
        points
    )
    assert sorted(p.gibbs for p in collected) == pytest.approx(sorted(p.gibbs for p in points))


@pytest.mark.slow
def test_a_run_that_ends_in_another_symmetry_is_said_to_have_become_it(grid):
    folder, _, _, _ = grid
    from magus_anharmonic.sscha.result import SschaResult

    run = point_folder(folder / "out" / "sscha", "hard", "LiH", 0.0, 0.0)
    result = SschaResult.read(run)
    point = point_of("hard", "LiH", replace(result, space_group="Pm-3m (221)"), run, HARD.atoms)
    assert point.status == "transformed" and "Pm-3m" in point.reason and not point.usable


def two_isotopes(seed=11):
    heavy = {
        n: replace(p, theta=p.theta / math.sqrt(2.0)) for n, p in (("R3m", LOW), ("Im-3m", HIGH))
    }
    return [*data({"R3m": LOW, "Im-3m": HIGH}, seed), *data(heavy, seed + 1, isotopes="D3S")]


def test_files_words_and_picture_hold_the_same_boundary(tmp_path):
    write_points(tmp_path / "g.csv", two_isotopes())
    result = CliRunner().invoke(
        app, ["phase-diagram", str(tmp_path / "g.csv"), "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    rows = csv_rows(tmp_path / "out" / "boundaries.csv")
    assert {row["isotopes"] for row in rows} == {"natural", "D3S"}
    first = next(
        row for row in rows if row["isotopes"] == "natural" and float(row["temperature_K"]) == 0
    )
    assert (
        f"R3m gives way to Im-3m (natural) at {float(first['pressure_GPa']):.1f} GPa"
        in result.output
    )
    assert float(first["lower_95_GPa"]) < boundary(0.0) < float(first["upper_95_GPa"])
    assert (
        "Going from natural to D3S moves the boundary" in result.output
        and "Clausius-Clapeyron" in result.output
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (
        summary["n_usable"] == 36
        and summary["isotope_shifts"]
        and summary["fits"][0]["n"] == {"G": 9, "V": 9, "S": 6}
    )
    assert (tmp_path / "out" / "phase-diagram.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "out" / "phase-diagram.svg").read_text()
    assert all(
        word in svg
        for word in ("pressure (GPa)", "temperature (K)", "R3m", "Im-3m", "boundary, D3S")
    )
    assert {row["phase"] for row in csv_rows(tmp_path / "out" / "stability.csv")} == {
        "R3m",
        "Im-3m",
    }
    assert not (tmp_path / "out" / "hull.csv").exists()


def test_a_phase_that_turns_into_another_is_bracketed_and_called_one_phase():
    points = [
        changed(p, space_group="Im-3m (229)" if p.phase == "Im-3m" else "R3m (160)")
        for p in data({"R3m": LOW, "Im-3m": HIGH}, 3)
    ]
    gone = [
        (
            changed(p, status="transformed", space_group="Im-3m (229)", same_as="Im-3m")
            if p.phase == "R3m" and p.pressure_GPa > 100
            else p
        )
        for p in points
    ]
    diagram = phase_diagram(gone, n_samples=200)
    assert [
        (m.phase, m.other, m.last, m.first, m.temperature) for m in diagram.continuous_transitions
    ] == [("R3m", "Im-3m", 60.0, 110.0, t) for t in (0.0, 300.0, 600.0)]
    words = " ".join(sentences(diagram))
    assert (
        "between 60 and 110 GPa at 0 K" in words
        and "R3m and Im-3m are one and the same phase" in words
    )
    assert not diagram.boundaries, "R3m has one pressure only: nothing is said beyond it"


@pytest.mark.parametrize("keep", [1, 2])
def test_one_point_or_two_make_a_picture_and_no_claim(tmp_path, keep):
    points = [
        p
        for p in data({"R3m": LOW, "Im-3m": HIGH}, 3)
        if (p.pressure_GPa, p.temperature_K) == (60.0, 0.0)
    ][:keep]
    diagram = phase_diagram(points, n_samples=200)
    write_diagram(diagram, tmp_path)
    assert (tmp_path / "phase-diagram.svg").stat().st_size > 1000 and not diagram.boundaries
    words = " ".join(sentences(diagram))
    assert "60 to 60 GPa" in words and ("no boundary crosses the grid" in words) == (keep == 2)


def test_compositions_make_a_hull_at_every_point_of_the_grid(tmp_path):
    sulphur, hydrogen, compound = (
        Phase(0.0, 5.0, 400.0),
        Phase(0.0, 1.5, 1500.0),
        Phase(-0.02, 2.2, 1100.0),
    )
    points = [
        *data({"S": sulphur}, 1, formula="S"),
        *data({"H2": hydrogen}, 2, formula="H2"),
        *data({"Im-3m": compound}, 3, formula="H3S"),
    ]
    diagram = phase_diagram(points, n_samples=200)
    write_diagram(diagram, tmp_path)
    rows = csv_rows(tmp_path / "hull.csv")
    assert len(rows) == 27
    for row in (row for row in rows if row["formula"] == "H3S"):
        p, t = float(row["pressure_GPa"]), float(row["temperature_K"])
        exact = float(
            compound.gibbs(p, t) - 0.75 * hydrogen.gibbs(p, t) - 0.25 * sulphur.gibbs(p, t)
        )
        assert float(row["formation_eV_per_atom"]) == pytest.approx(
            exact, abs=4 * float(row["formation_error_eV_per_atom"])
        )
        assert (float(row["distance_eV_per_atom"]) == 0) == (
            float(row["formation_eV_per_atom"]) < 0
        )
    assert any("Hull against H2 and S at 60 GPa" in line for line in sentences(diagram))
    assert (tmp_path / "hull.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "hull.svg"
    ).stat().st_size > 1000
    with pytest.raises(InputError, match="no phase of S"):
        phase_diagram(points[9:], n_samples=200)


@pytest.mark.slow
def test_from_structures_of_several_compositions_to_the_hull_of_their_free_energies(tmp_path):
    """Copper and gold by EMT, whose ordered phases form; ASE's phase diagram of the same free
    energies says who is on the hull."""
    from ase.phasediagram import PhaseDiagram as AsePhaseDiagram

    corners = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    structures = {
        "Cu": bulk("Cu"),
        "Au": bulk("Au"),
        "L1_0": Atoms(
            "CuAu", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.82, 2.82, 3.65], pbc=True
        ),
        "copper-rich": Atoms("AuCu3", scaled_positions=corners, cell=[3.75] * 3, pbc=True),
        "gold-rich": Atoms("CuAu3", scaled_positions=corners, cell=[4.0] * 3, pbc=True),
    }
    for name, atoms in structures.items():
        atoms.write(tmp_path / f"{name}.vasp", direct=True)
    sscha = {"supercell": {"min_length": 5.0}, "n_configs": 40, "max_populations": 6}
    keys = {
        "phases": {name: f"{name}.vasp" for name in structures},
        "pressures": [0],
        "sscha": sscha,
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(keys))
    points = run_locked(load_phase_diagram(tmp_path / "p.yaml"), tmp_path / "out", Emt())
    gibbs = {p.phase: p.gibbs for p in points}

    write_diagram(phase_diagram(points, n_samples=200), tmp_path / "elements")
    rows = {row["phase"]: row for row in csv_rows(tmp_path / "elements" / "hull.csv")}
    oracle = AsePhaseDiagram(
        [(str(a.symbols), len(a) * gibbs[name]) for name, a in structures.items()], verbose=False
    )
    for name, atoms in structures.items():
        lowest, *_ = oracle.decompose(str(atoms.symbols))
        assert float(rows[name]["distance_eV_per_atom"]) == pytest.approx(
            gibbs[name] - lowest / len(atoms), abs=1e-6
        )
        mixed = np.mean([gibbs[symbol] for symbol in atoms.get_chemical_symbols()])
        assert float(rows[name]["formation_eV_per_atom"]) == pytest.approx(
            gibbs[name] - mixed, abs=1e-6
        )
    assert (
        float(rows["gold-rich"]["distance_eV_per_atom"])
        > 0
        == float(rows["copper-rich"]["distance_eV_per_atom"])
    )
    assert float(rows["L1_0"]["formation_eV_per_atom"]) < 0

    pair = [p for p in points if p.phase in ("Cu", "copper-rich", "L1_0")]
    write_diagram(phase_diagram(pair, end_members=["Cu", "L1_0"], n_samples=200), tmp_path / "pair")
    row = next(
        row for row in csv_rows(tmp_path / "pair" / "hull.csv") if row["phase"] == "copper-rich"
    )
    against = 0.5 * gibbs["Cu"] + 0.5 * gibbs["L1_0"]
    assert float(row["formation_eV_per_atom"]) == pytest.approx(
        gibbs["copper-rich"] - against, abs=1e-6
    )
    assert row["fractions"] == "0.5 0.5" and (tmp_path / "pair" / "hull.png").is_file()


def test_a_free_energy_of_a_run_that_went_astray_counts_for_nothing_and_is_named():
    points = [p for p in data({"R3m": LOW, "Im-3m": HIGH}, 3) if p.temperature_K == 0]
    diverged = changed(points[0], predicted_decrease=15.9, gibbs=9.0, reason="stress 11.61 GPa off")
    with_it, without = (
        phase_diagram([*points[1:], *more], n_samples=100) for more in ([diverged], [])
    )
    assert with_it.boundaries == without.boundaries
    assert any("failed at 60 GPa, 0 K: stress 11.61 GPa off" in line for line in sentences(with_it))


def test_an_upper_bound_moves_no_boundary_and_is_named_with_its_number(tmp_path):
    points = [p for p in data({"R3m": LOW, "Im-3m": HIGH}, 3) if p.temperature_K == 0]
    high = changed(
        points[0], status="unconverged", gibbs=points[0].gibbs + 0.02, reason="stress 1.1 GPa off"
    )
    write_points(tmp_path / "gibbs.csv", [high, *points[1:]])
    with_it, without = (
        phase_diagram(read_points(tmp_path / "gibbs.csv"), n_samples=100),
        phase_diagram(points[1:], n_samples=100),
    )
    assert [one.pressure_GPa for one in with_it.boundaries] == pytest.approx(
        [one.pressure_GPa for one in without.boundaries]
    )
    said = " ".join(sentences(with_it))
    assert (
        f"did not converge at 60 GPa, 0 K (stress 1.1 GPa off): its {high.gibbs:.4f}"
        " eV/atom is an upper bound" in said
    )


def test_three_end_members_and_two_isotopes_have_a_picture_too(tmp_path):
    from magus_anharmonic.phase_diagram.diagram import HullRow
    from magus_anharmonic.phase_diagram.figures import draw_hull

    formulas = ["H", "S", "Li", "H3S", "LiH", "H6SLi"]
    energies = np.array([0.0, 0.0, 0.0, -0.1, -0.2, -0.05])
    for count, corners in ((6, ["H", "Li", "S"]), (3, ["H", "S"])):
        keep = [i for i, name in enumerate(formulas) if count == 6 or "Li" not in name]
        names = [formulas[i] for i in keep]
        noise = 1e-3 * np.random.default_rng(0).standard_normal((50, len(keep)))
        found = hull_entries(names, names, energies[keep], energies[keep] + noise, corners)
        rows = [
            HullRow(isotopes, 100.0, 0.0, one) for isotopes in ("natural", "D") for one in found
        ]
        svg = draw_hull(rows, corners, tmp_path, f"hull{count}")[0].read_text()
        assert svg.startswith("<?xml") and len(svg) > 5000


def test_the_error_of_the_potential_widens_the_bands_and_is_named():
    points = [p for p in two_isotopes() if p.temperature_K == 0]
    narrow, wide = (phase_diagram(points, n_samples=300, model_error=e) for e in (0.0, 2e-3))
    assert np.mean(
        [b.error_GPa for b in wide.boundaries if math.isfinite(b.error_GPa)]
    ) > 2 * np.mean([b.error_GPa for b in narrow.boundaries])
    assert (
        "not the error of the potential" in sentences(narrow)[-1]
        and "2 meV/atom for the potential" in sentences(wide)[-1]
    )


def test_points_of_several_models_and_points_without_free_energies_are_refused():
    points = two_isotopes()
    with pytest.raises(InputError, match="several models"):
        phase_diagram(
            [changed(points[0], model="abc"), *(changed(p, model="xyz") for p in points[1:])]
        )
    with pytest.raises(InputError, match="dissociated"):
        phase_diagram([changed(p, status="failed", reason="dissociated") for p in points])


GOOD = {
    "phases": {"a": "a.vasp"},
    "pressures": [100, 200],
    "temperatures": [0, 300],
    "checkpoint": "h3s-gpaw-small",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pressures": [200, 100]}, ["pressures", "out of order", "100 comes after 200"]),
        ({"pressures": [100, 100]}, ["pressures", "out of order"]),
        ({"pressures": [1e11]}, ["pressures", "Pa", "100 GPa"]),
        ({"pressures": []}, ["pressures"]),
        ({"temperatures": [-3]}, ["temperatures"]),
        ({"phases": {}}, ["phases", "at least one"]),
        ({"phases": {"a": "nowhere.vasp"}}, ["phases.a", "nowhere.vasp", "no such file"]),
        ({"phases": {"a": {"structur": "a.vasp"}}}, ["structur", "did you mean structure"]),
        ({"pressure": [100]}, ["pressure", "did you mean pressures"]),
        ({"isotopes": {"D": {"Hx": 2.0}}}, ["isotopes", "Hx"]),
        ({"isotopes": {"D": {"H": -2.0}}}, ["isotopes", "D"]),
        ({"sscha": {"temperature": 300}}, ["sscha", "temperature", "temperatures"]),
        ({"sscha": {"budget": 300}}, ["sscha", "budget", "not used"]),
        ({"sscha": {"n_configs": 7}}, ["n_configs", "even"]),
    ],
)
def test_a_wrong_input_ends_with_code_2_and_leaves_nothing_behind(
    tmp_path, monkeypatch, change, words
):
    monkeypatch.chdir(tmp_path)
    SOFT.atoms.write("a.vasp", direct=True)
    Path("p.yaml").write_text(yaml.safe_dump({**GOOD, **change}))
    result = CliRunner().invoke(app, ["phase-diagram", "p.yaml"])
    assert result.exit_code == 2, result.output
    assert all(word in result.output for word in words), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.vasp", "p.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.vasp"], ["--pressure"]),
        (["a.vasp", "--pressure", "100", "--isotope", "D3S"], ["--isotope", "D3S:H=2.014"]),
        (["g.csv", "--pressure", "100"], ["g.csv", "alone"]),
        (["empty"], ["result.json"]),
        (["nowhere.csv"], ["nowhere.csv", "no such file"]),
        (["g.csv", "--model-error", "-1 meV"], ["--model-error: -0.001", "negative"]),
        (["g.csv", "--seed", "-1"], ["--seed: -1", "negative"]),
    ],
)
def test_wrong_arguments_end_with_code_2(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    SOFT.atoms.write("a.vasp", direct=True)
    Path("empty").mkdir()
    write_points("g.csv", two_isotopes())
    result = CliRunner().invoke(app, ["phase-diagram", *arguments])
    assert result.exit_code == 2 and all(word in result.output for word in words), result.output


def test_the_command_takes_the_points_of_its_own_folder_again(tmp_path):
    write_points(tmp_path / "gibbs.csv", [p for p in two_isotopes() if p.temperature_K == 0])
    arguments = [str(tmp_path), "-o", str(tmp_path / "again"), "--model-error", "1e-3"]
    result = CliRunner().invoke(app, ["phase-diagram", *arguments])
    assert (tmp_path / "again" / "phase-diagram.svg").is_file()
    assert "1 meV/atom for the potential" in result.output


def test_the_shipped_example_is_valid_and_its_structures_are_the_phases_it_names():
    from magus_anharmonic.phase_diagram.grid import read_phase
    from magus_anharmonic.structures import space_group

    settings = load_phase_diagram(
        Path(__file__).parents[1] / "inputs" / "h3s-phase-diagram" / "phase-diagram.yaml"
    )
    groups = {
        name: space_group(read_phase(name, phase)).split(" ")[0]
        for name, phase in settings.phases.items()
    }
    assert groups == {"Im-3m": "Im-3m", "R3m": "R3m"}
    assert settings.isotopes["D3S"] == {"H": 2.014} and len(settings.pressures) == 3


def test_phases_that_agree_in_free_energy_and_volume_are_said_to_be_perhaps_one():
    points = data({"R3m": LOW, "Im-3m": HIGH}, 11, temperatures=(0.0,))
    assert not any(
        "perhaps they are one phase" in line
        for line in sentences(phase_diagram(points, n_samples=200))
    )
    last = [p for p in points if p.pressure_GPa == 160.0 and p.phase == "Im-3m"][0]
    duplicates = [
        (changed(last, phase="R3m", gibbs=last.gibbs + 5e-4) if p.pressure_GPa == 160.0 else p)
        for p in points
    ]
    duplicates = [
        last if p.pressure_GPa == 160.0 and points[k].phase == "Im-3m" else p
        for k, p in enumerate(duplicates)
    ]
    words = [
        line
        for line in sentences(phase_diagram(duplicates, n_samples=200))
        if "perhaps they are one phase" in line
    ]
    assert len(words) == 1 and "At 160 GPa, 0 K" in words[0]
