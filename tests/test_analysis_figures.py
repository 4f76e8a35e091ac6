"""Numbers behind the paper's figures, on tables with known answers; pictures exist, also where
there is little to show."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from campaign_tables import foundation, ranking, relaxed, soft_mode, write_campaign

from magus_anharmonic.errors import InputError
from magus_anharmonic.io import pictures as style
from magus_anharmonic.io.files import SUMS
from magus_anharmonic.paper import enthalpies, quantities, script, tables

figures = script("figures")
make_figures, mark_transitions = figures.make_figures, figures.mark_transitions

NAMES = {
    "table_1",
    "fig_2_enthalpy_volume-150GPa",
    "fig_3_parity-finetuned",
    "fig_4a_modes-Im-3m-T1u",
    "fig_4b_dispersion-Im-3m-60GPa",
    "fig_5_relative_enthalpy",
    "fig_6_ranking-100GPa",
    "fig_7_gradient_errors-Im-3m-60GPa",
    "learning",
}


def test_table_one_is_in_the_papers_order_and_units(tmp_path):
    write_campaign(tmp_path)
    lines = quantities.table_one(
        tables.read(tables.ModelError, tmp_path / "tables" / "model_errors.csv")
    )
    assert [(line.set, line.model) for line in lines][:3] == [
        ("training", "foundation"),
        ("training", "finetuned"),
        ("validation", "foundation"),
    ]
    assert (
        lines[1].energy_meV_per_atom,
        lines[1].force_meV_per_A,
        lines[1].stress_GPa,
    ) == pytest.approx((6.1, 117.7, 0.48))


def test_the_rank_of_a_named_phase_counts_distinct_structures():
    (found,) = enthalpies.ranks(foundation(60, np.random.default_rng(0)))
    assert (found.phase, found.rank, found.n_distinct) == ("R3m", 6, 61)
    assert found.above_lowest_meV_per_atom == pytest.approx(65.0)


def test_parity_statistics_are_those_of_the_errors():
    rows = [
        tables.Parity("m", "test", "force", "eV/A", x, x + e)
        for x, e in ((0.0, 0.1), (1.0, -0.1), (2.0, 0.3), (3.0, 0.1))
    ]  # type: ignore[arg-type]
    (found,) = quantities.parity_statistics(rows)
    assert (found.n, found.rmse, found.mean_absolute, found.mean) == pytest.approx(
        (4, np.sqrt(0.03), 0.15, 0.1)
    )
    assert found.r_squared == pytest.approx(1 - 0.12 / 5.0)
    assert quantities.parity_statistics(rows[:1])[0].r_squared is None


def test_transitions_are_where_the_lower_envelope_changes():
    found = enthalpies.transitions(relaxed())
    assert [(change.below, change.above) for change in found] == [("C2/c", "R3m"), ("R3m", "Im-3m")]
    assert [change.pressure_GPa for change in found] == pytest.approx([112.0, 177.0])


def test_labels_of_close_transitions_do_not_cover_each_other():
    changes = [
        enthalpies.Transition(f"phase {i}", f"phase {i + 1}", 110.0 + 2 * i, 100.0, 150.0)
        for i in range(6)
    ]
    with style.figure() as (made, (axes,)):
        axes.set_xlim(50, 200)
        mark_transitions(axes, changes)
        made.canvas.draw()
        boxes = [label.get_window_extent() for label in axes.texts if label.get_text()]
        panel, page = axes.get_window_extent(), made.bbox
    assert len(boxes) == 6
    assert all(box.y0 >= panel.y1 and box.y1 <= page.y1 and box.x1 <= page.x1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_two_transitions_between_two_pressures_are_both_found():
    rows = [row for row in relaxed() if row.pressure_GPa in (50.0, 200.0)]
    assert [change.pressure_GPa for change in enthalpies.transitions(rows)] == pytest.approx(
        [112.0, 177.0]
    )


def test_a_phase_that_relaxes_into_another_is_that_one_and_its_noise_is_no_crossing():
    """Im-3m in two cells, and R3m that is Im-3m from 150 GPa on; the enthalpies of the two differ
    by the noise of relaxations."""
    rows = []
    for p, height, noise in (
        (50.0, -0.05, 0.0),
        (100.0, -0.006, 0.0),
        (150.0, 0.0, 3e-6),
        (200.0, 0.0, -1e-6),
    ):
        group = "R3m (160)" if height else "Im-3m (229)"
        rows.append(
            tables.Enthalpy(
                f"a{p}", "Im-3m", "H6S2", 8, "Im-3m (229)", p, 4.0, 0.01 * p, "m", "relax"
            )
        )
        rows.append(
            tables.Enthalpy(
                f"b{p}",
                "R3m",
                "H3S",
                4,
                group,
                p,
                4.01 if not height else 4.2,
                0.01 * p + height + noise,
                "m",
                "relax",
            )
        )
    (change,) = enthalpies.transitions(rows)
    assert (change.below, change.above, change.where, change.how) == (
        "R3m",
        "Im-3m",
        "100 to 150 GPa",
        "continuous",
    )
    found = {
        (row.phase, row.pressure_GPa): row.same_as for row in enthalpies.relative_enthalpies(rows)
    }
    assert found["R3m", 100.0] == "" and found["R3m", 150.0] == "Im-3m" == found["R3m", 200.0]
    assert {row.n_distinct for row in enthalpies.ranks(rows) if row.pressure_GPa == 50.0} == {2}, (
        "cells of one composition are compared"
    )


def test_relative_enthalpies_refer_to_the_reference_or_to_the_best_known_phase():
    found = enthalpies.relative_enthalpies(relaxed())
    assert {row.relative_meV_per_atom for row in found if row.phase == "Im-3m"} == {0.0}
    without = [row for row in relaxed() if row.phase != "Im-3m"][1:]
    assert enthalpies.relative_enthalpies(without)[0].reference == "C2/c"
    assert enthalpies.relative_enthalpies(foundation(10, np.random.default_rng(0))) == []


def test_critical_pressures_are_found_within_their_errors():
    found = {
        (c.method, c.energies_by): c
        for c in quantities.critical_pressures(soft_mode(np.random.default_rng(1)))
    }
    harmonic = found["harmonic", "model"]
    assert (
        harmonic.critical_pressure_GPa == pytest.approx(173.0, abs=1e-6)
        and harmonic.error_GPa is None
    )
    for who, exact in (("model", 100.0), ("dft", 105.0)):
        critical = found["sscha-hessian", who]
        assert critical.how == "parabola"
        assert critical.critical_pressure_GPa == pytest.approx(exact, abs=3 * critical.error_GPa)


def test_the_error_of_a_critical_pressure_is_the_spread_of_repeated_experiments():
    many, errors = [], []
    for seed in range(200):
        points = [
            row
            for row in soft_mode(np.random.default_rng(seed))
            if row.method == "sscha-hessian" and row.energies_by == "model"
        ]
        x, y = (
            np.array([p.pressure_GPa for p in points]),
            np.array([p.frequency_squared_cm2 for p in points]),
        )
        many.append(quantities._parabola_root(x, np.full(len(x), 2e4))(x, y))
        if seed < 5:
            errors.append(quantities.critical_pressure(points).error_GPa)
    assert np.mean(errors) == pytest.approx(np.std(many), rel=0.2)


def critical_pressure(pressures, squares, errors):
    """Of one curve."""
    curve = "Im-3m", "Im-3m (229)", "T1u"
    points = zip(pressures, squares, errors, strict=True)
    return quantities.critical_pressure(
        [tables.Mode(*curve, p, "harmonic", "model", y, error, "m") for p, y, error in points]
    )


@pytest.mark.parametrize(
    ("pressures", "squares", "words"),
    [
        ([100.0], [5.0], "one pressure alone"),
        (
            [100.0, 150.0],
            [-5.0, -1.0],
            "no change from negative to positive between 100 and 150 GPa (negative",
        ),
        ([100.0, 150.0, 200.0], [5.0, 6.0, 7.0], "(positive at the highest)"),
    ],
)
def test_no_critical_pressure_without_a_change_of_sign(pressures, squares, words):
    found = critical_pressure(pressures, squares, [None] * len(pressures))
    assert found.critical_pressure_GPa is None and found.error_GPa is None
    assert words in found.reason == found.words


def test_the_zero_that_counts_is_the_one_above_which_the_structure_is_stable():
    x = [0.0, 10.0, 20.0, 30.0, 40.0]
    y = [-(p - 5.0) * (p - 35.0) for p in x]
    for errors in ([1.0] * 5, [None] * 5):
        found = critical_pressure(x, y, errors)
        close = 0.01 if found.how == "parabola" else 1.5
        assert found.critical_pressure_GPa == pytest.approx(5.0, abs=close)


def test_two_points_with_errors_give_a_line_and_an_error():
    found = critical_pressure([100.0, 120.0], [-10.0, 30.0], [1.0, 1.0])
    assert (found.critical_pressure_GPa, found.how) == (pytest.approx(105.0), "interpolation")
    slope = 2.0
    assert found.error_GPa == pytest.approx(np.sqrt(0.75**2 + 0.25**2) / slope, rel=0.1)


def test_the_reordering_is_told_from_the_linear_part():
    checked = [
        tables.SpaceGroups(
            f"s{i}",
            100.0,
            f"C2 ({i + 3})",
            "" if i == 4 else f"C2 ({i + 3})",
            "Im-3m (229)",
            None,
            "",
        )
        for i in range(1, 5)
    ]
    numbers, moved = quantities.reordering(ranking(), checked)
    assert (numbers.n, numbers.n_changed, numbers.best, numbers.n_transformed_best) == (
        20,
        4,
        "Im-3m",
        4,
    )
    assert (numbers.n_checked_by_dft, numbers.n_kept_by_dft) == (3, 3)
    assert numbers.slope == pytest.approx(1.0, abs=0.01)
    assert numbers.window == pytest.approx(48.0)
    few = quantities.reordering(ranking()[:7])[0]
    assert few.window is None and few.slope is not None, (
        "one structure off the line of a few says nothing about a window"
    )
    assert numbers.shift == pytest.approx(
        np.mean([0.2] * 16 + [0.17 - 0.012 * i for i in range(1, 5)]) * 1e3, abs=0.1
    )
    assert len(moved) == 20 and min(m.gibbs_meV_per_atom for m in moved) == 0.0


def test_a_saddle_point_is_not_the_phase_that_others_become():
    rows = [
        row.updated(status="saddle", gibbs=-4.0, space_group="Pm-3m (221)")
        if row.id == "s0"
        else row
        for row in ranking()
    ]
    assert quantities.reordering(rows)[0].best == "Im-3m"


def test_every_figure_is_made_with_its_files(tmp_path):
    campaign = write_campaign(tmp_path / "campaign")
    made, missing = make_figures(tmp_path)
    assert missing == [] and {figure.name for figure in made} == NAMES
    for figure in made:
        assert figure.csv.parent == campaign / "figures" and figure.csv.stat().st_size > 50
        assert figure.png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert ElementTree.parse(figure.svg).getroot().tag.endswith("svg")
        assert figure.title and figure.alt
    (critical,) = [figure for figure in made if figure.name.startswith("fig_4a")]
    assert "critical_pressure_GPa" in critical.summary.read_text()
    assert "zero at 173.0 GPa" in critical.alt


def test_an_empty_campaign_makes_nothing_and_says_why(tmp_path):
    made, missing = make_figures(tmp_path)
    assert made == [] and len(missing) == 9
    assert all("not done" in one.reason for one in missing)
    with pytest.raises(InputError, match="no such folder"):
        make_figures(tmp_path / "nowhere")


def test_a_wrong_table_costs_its_own_figures_alone_and_old_files_go(tmp_path):
    write_campaign(tmp_path)
    (tmp_path / "tables" / SUMS).unlink()  # tables of a user
    (tmp_path / "figures").mkdir()
    for name in ("fig_4a_modes-old.png", "table_1-summary.csv", "mine.png"):
        (tmp_path / "figures" / name).write_text("old")
    path = tmp_path / "tables" / "modes.csv"
    path.write_text(path.read_text().replace("frequency_squared_cm2", "frequency_squared_THz2"))
    for table in tables.TABLES:
        other = tmp_path / "tables" / table.FILE
        if table not in (tables.Mode, tables.ModelError) and other.is_file():
            other.unlink()
    made, missing = make_figures(tmp_path)
    assert {figure.name for figure in made} == {
        "table_1",
        "fig_4b_dispersion-Im-3m-60GPa",
        "fig_6_ranking-100GPa",
    }
    reasons = {one.name: one.reason for one in missing}
    assert (
        "frequency_squared_THz2" in reasons["fig_4a_modes"]
        and "enthalpies.csv is not there" in reasons["fig_5_relative_enthalpy"]
    )
    left = {path.name for path in (tmp_path / "figures").iterdir()}
    assert "mine.png" in left and "fig_4a_modes-old.png" not in left


def test_one_point_each_and_no_error_bars_are_still_pictures(tmp_path):
    write_campaign(tmp_path)
    (tmp_path / "tables" / SUMS).unlink()  # tables of a user
    for path in (tmp_path / "tables").glob("*.csv"):
        lines = path.read_text().splitlines()
        first = next((line for line in lines[1:] if "Im-3m-50" in line), lines[1])
        path.write_text("\n".join([lines[0], first]) + "\n")
    made, missing = make_figures(tmp_path)
    assert {figure.name for figure in made} | {"fig_2_enthalpy_volume-150GPa"} == NAMES
    assert [one.name for one in missing] == ["fig_2_enthalpy_volume"]
    assert all(figure.png.stat().st_size > 3000 for figure in made)
