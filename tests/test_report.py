"""What the report says follows from the numbers of the ranking, and from nothing else."""

import csv
import io
import re

import pytest
from rich.console import Console

from magus_anharmonic.io.tables import columns
from magus_anharmonic.ranking.candidate import Candidate, numbered, read_ranking
from magus_anharmonic.report.figures import slope_chart
from magus_anharmonic.report.screen import console, table
from magus_anharmonic.report.text import ranking_views, sentences

R3M = {
    "id": "aaaaaaaaaaaa",
    "spg_static": "R3m (160)",
    "spg_quantum": "Im-3m (229)",
    "enthalpy_eV_per_atom": "-1.000",
    # fmt: skip
    "gibbs_eV_per_atom": "-0.810",
    "gibbs_error_eV_per_atom": "0.001",
    "status": "converged",
}
CCCM = {
    "id": "bbbbbbbbbbbb",
    "spg_static": "Cccm (66)",
    "spg_quantum": "Cccm (66)",
    "enthalpy_eV_per_atom": "-1.010",
    # fmt: skip
    "gibbs_eV_per_atom": "-0.800",
    "gibbs_error_eV_per_atom": "0.001",
    "status": "converged",
}
FAILED = {
    "id": "cccccccccccc",
    "spg_static": "P1 (1)",
    "enthalpy_eV_per_atom": "-0.9",
    "status": "failed",
    "reason": "dissociated",
}
ESTIMATED = {
    "id": "dddddddddddd",
    "spg_static": "P-1 (2)",
    "enthalpy_eV_per_atom": "-0.95",
    "gibbs_eV_per_atom": "-0.99",
    "status": "estimated",
}


@pytest.fixture
def rows(tmp_path):
    def make(*lines):
        file = tmp_path / "ranking.csv"
        common = {"formula": "H3S", "natoms": "4", "pressure_GPa": "150", "temperature_K": "0"}
        with file.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, columns(Candidate))
            writer.writeheader()
            writer.writerows({**common, **line} for line in lines)
        return read_ranking(file)

    return make


def ranks(rows, by="rank_quantum"):
    return {row.id: getattr(row, by) for row in numbered(rows) if getattr(row, by)}


def table_of(rows, width=160):
    (view,) = ranking_views("ranking.csv", rows)
    return table(view, width=width)


def text_of(rows):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(table_of(rows))
    return console.export_text()


def test_the_order_of_free_energies_is_told_apart_from_that_of_enthalpies(rows):
    found = rows(R3M, CCCM)
    assert ranks(found, "rank_static") == {"bbbbbbbbbbbb": 1, "aaaaaaaaaaaa": 2}
    assert ranks(found) == {"aaaaaaaaaaaa": 1, "bbbbbbbbbbbb": 2}
    said = " ".join(sentences(found))
    assert "aaaaaaaa: R3m (160) static, Im-3m (229) with SSCHA." in said
    assert "Lowest free energy: aaaaaaaa (Im-3m (229))." in said
    assert (
        "Lowest static enthalpy: bbbbbbbb (Cccm (66)), in free energy 10.0 ± 1.4 meV/atom (sampling"
        " alone) higher." in said
    )
    assert "G - H: 190 to 210 meV/atom" in said


def test_phases_without_long_range_dipoles_are_named_where_others_have_them(rows):
    polar = {**R3M, "nonanalytic_eV_per_atom": "0.003"}
    assert not any("dipoles" in line for line in sentences(rows(R3M, CCCM)))
    told = "are in G of 1 phase, not in that of bbbbbbbb: do not compare."
    assert f"Long-range dipoles (LO-TO) {told}" in sentences(rows(polar, CCCM))
    both = sentences(rows(polar, {**CCCM, "nonanalytic_eV_per_atom": "0"}))
    assert "Long-range dipoles (LO-TO) are in G of 2 phases." in both


def test_probabilities_cost_and_all_errors_of_a_difference_are_said(rows):
    winner = {**R3M, "p_lowest_sampling": "0.99", "p_lowest_total": "0.84", "n_evaluations": "1200"}
    other = {
        **CCCM,
        "difference_sampling_error_eV_per_atom": "0.003",
        "difference_model_error_eV_per_atom": "0.004",
        "n_evaluations": "34",
    }
    said = sentences(rows(winner, other))
    assert said[0].endswith("probability 99 % by sampling, 84 % with all errors.")
    assert "10.0 ± 5.0 meV/atom (sampling 3.0, finite size unknown, model 4.0) higher" in said[2]
    assert said[-1] == "Cost: 1,234 evaluations of energy and forces in 2 SSCHA runs."
    less_sure = {**other, "difference_model_error_eV_per_atom": "0.006"}
    assert "not told apart" in sentences(rows(winner, less_sure))[2]


def test_an_estimate_is_never_the_best_even_when_its_number_is_lower(rows):
    found = rows(R3M, ESTIMATED)
    assert ranks(found) == {"aaaaaaaaaaaa": 1}
    assert "dddddddd" not in " ".join(sentences(found))


def test_a_difference_within_two_errors_is_called_undecided(rows):
    close = {**CCCM, "gibbs_eV_per_atom": "-0.809"}
    assert any("not told apart" in line for line in sentences(rows(R3M, close)))
    assert not any("not told apart" in line for line in sentences(rows(R3M, CCCM)))
    parts = {"sampling": "0.001", "finite_size": "0.006", "model": ""}
    named = {f"difference_{part}_error_eV_per_atom": value for part, value in parts.items()}
    (said,) = (line for line in sentences(rows(R3M, {**CCCM, **named})) if "told apart" in line)
    assert "6.1 meV/atom (sampling 1.0, finite size 6.0, model unknown)" in said, "all three count"


@pytest.mark.parametrize("width", [60, 70, 80])
def test_on_a_narrow_terminal_nothing_is_cut_and_what_did_not_converge_has_no_height(
    rows, monkeypatch, width
):
    monkeypatch.setenv("COLUMNS", str(width))
    long = {**CCCM, "name": "a-rather-long-folder/with-a-long-name-of-a-file.vasp"}
    screen = type(console())(record=True, width=width, file=io.StringIO())
    screen.print(table_of(rows(R3M, long, SADDLE), width))
    text = screen.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    cells = [line.split("│") for line in text.splitlines() if "│" in line]
    assert "with-a-long-name-of-a-file.vasp" in "".join(line[1].strip() for line in cells)
    one, other = (
        {**line, "status": "unconverged", "gibbs_eV_per_atom": gibbs, "name": "a@0"}
        for line, gibbs in ((R3M, "-722.2826"), (CCCM, "-722.2816"))
    )
    found = rows(one, other, {**FAILED, "gibbs_eV_per_atom": "-999"})
    screen.print(table_of(found, width))
    text = screen.export_text()
    assert text.count("not│") == 2 and not re.search("722|999|…", text)
    cells = [line.split("│")[-1].strip() for line in text.splitlines() if "│" in line]
    assert "".join(cells).count("unconverged") == 2
    assert width < 80 or text.count("unconverged") == 2, "whole words"


def test_a_phase_found_twice_counts_once(rows):
    duplicate = {**CCCM, "same_as": "aaaaaaaaaaaa", "spg_quantum": "Im-3m (229)"}
    found = rows(R3M, duplicate)
    assert ranks(found) == {"aaaaaaaaaaaa": 1}
    shown = text_of(rows(R3M, duplicate, ESTIMATED))
    assert shown.index("same as aaaaaaaa") < shown.index("estimated"), (
        "what was computed comes before what was estimated"
    )
    assert "Im-3m (229): aaaaaaaa (R3m (160)), bbbbbbbb (Cccm (66))." in " ".join(sentences(found))


def test_without_any_free_energy_the_report_says_so(rows):
    assert sentences(rows({**R3M, "status": "static", "gibbs_eV_per_atom": ""})) == [
        "No structure has a free energy; the order is that of the static enthalpy."
    ]


def test_the_table_shows_failures_and_how_many_places_were_gained(rows):
    shown = text_of(rows(R3M, CCCM, FAILED))
    assert "failed" in shown and "+1" in shown and "-1" in shown


@pytest.mark.parametrize("lines", [(), (R3M,), (R3M, CCCM, FAILED, ESTIMATED)])
def test_the_picture_is_drawn_for_any_number_of_points(rows, tmp_path, lines):
    for path in slope_chart(rows(*lines), tmp_path, "ranking"):
        assert path.stat().st_size > 5000


def test_a_winner_that_changed_its_symmetry_is_named_by_both(rows):
    lowest = {**R3M, "enthalpy_eV_per_atom": "-1.02"}
    said = sentences(rows(lowest, CCCM))
    assert "Lowest static enthalpy: the same structure, R3m (160)." in said
    assert said[0] == "Lowest free energy: aaaaaaaa (Im-3m (229))."


def test_a_structure_of_the_winning_phase_may_have_the_lowest_enthalpy(rows):
    """R3m, I4mm and Im-3m of H3S are one phase with SSCHA; which of them stands for it says
    nothing about their enthalpies."""
    duplicate = {
        **CCCM,
        "enthalpy_eV_per_atom": "-1.02",
        "spg_quantum": R3M["spg_quantum"],
        "same_as": R3M["id"],
    }
    said = sentences(rows(R3M, duplicate))
    assert (
        "Lowest static enthalpy: bbbbbbbb (Cccm (66)), which becomes the phase of the lowest G."
        in said
    )


def test_one_that_did_not_converge_is_shown_named_and_never_the_best(rows, tmp_path):
    open_ = {
        **CCCM,
        "gibbs_eV_per_atom": "-0.95",
        "status": "unconverged",
        "reason": "not converged after 30 populations",
    }
    found = rows(R3M, open_)
    assert ranks(found) == {"aaaaaaaaaaaa": 1}
    said = " ".join(sentences(found))
    assert "Not converged within the budget: bbbbbbbb." in said and "energy: aaaaaaaa" in said
    assert "unconverged" in text_of(found) and "-140.0" in text_of(found), (
        "its upper bound stays in the table"
    )
    found = rows({**open_, "gibbs_eV_per_atom": "-0.7"}, {**R3M, "status": "unconverged"})
    assert (
        sentences(found)[0]
        == "No free energy has converged; the order is that of the static enthalpy."
    )
    assert [row.id[0] for row in numbered(found)] == ["b", "a"]


SADDLE = {
    **R3M,
    "id": "eeeeeeeeeeee",
    "spg_static": "Im-3m (229)",
    "gibbs_eV_per_atom": "-0.80",
    "status": "saddle",
    "hessian_deciding_cm1": "-310.2",
    "hessian_error_cm1": "42.0",
}
BELOW = {
    **R3M,
    "id": "ffffffffffff",
    "spg_quantum": "R3m (160)",
    "enthalpy_eV_per_atom": "",
    "gibbs_eV_per_atom": "-0.83",
    "status": "stable",
    "parent": "eeeeeeeeeeee",
}


def test_a_saddle_point_is_named_is_never_the_best_and_what_lies_below_it_is(rows, tmp_path):
    found = rows(SADDLE, BELOW, CCCM)
    assert ranks(found) == {"ffffffffffff": 1, "bbbbbbbbbbbb": 2}
    said = " ".join(sentences(found))
    assert (
        "Saddle point, not ranked: eeeeeeee (Im-3m (229)), mode at -310 ± 42 cm⁻¹; below it:"
        " ffffffff (R3m (160))." in said
    )
    assert "energy: ffffffff (R3m (160)), found below the saddle point eeeeeeee." in said
    assert " saddle " in text_of(found) and " stable " in text_of(found), "words of ranking.csv"


def test_a_saddle_point_below_which_nothing_was_found_is_said_to_be_missing_from_the_ranking(rows):
    alone = rows(SADDLE)
    assert ranks(alone) == {}
    assert (
        "below it: nothing was found" in " ".join(sentences(alone))
        and "No structure has a free energy" in sentences(alone)[0]
    )


def test_a_phase_that_noise_leaves_open_is_no_finding(rows):
    open_ = {
        **R3M,
        "spg_quantum": "R3m (160) or Im-3m (229): not decided, 2.3 sigma",
        "enthalpy_eV_per_atom": "-1.02",
    }
    found = rows(open_)
    said = " ".join(sentences(found))
    assert "with SSCHA" in said and "static," not in said and "for certain" in said
    assert "aaaaaaaa (R3m (160) or Im-3m (229): not decided, 2.3 sigma)" in said
    assert "R3m -> R3m or Im-3m " in text_of(found)
