"""Each quantity of a campaign by every way in which a user can see it: numbers and words of the
figures, `validate` as a function and as a command, and the report give one answer."""

import json
import re

import pytest
import yaml
from campaign_tables import write_campaign
from records import csv_rows
from typer.testing import CliRunner

from magus_anharmonic.cli import app
from magus_anharmonic.paper import script
from magus_anharmonic.report.contents import campaign_contents

WANTED = [
    *(
        {"name": name, "model": model, "set": "test", "unit": unit, "value": 0}
        for name, unit in (
            ("energy_rmse", "meV/atom"),
            ("force_rmse", "meV/A"),
            ("stress_rmse", "GPa"),
        )
        for model in ("foundation", "finetuned")
    ),
    {"name": "stability_sequence", "unit": "-", "value": ["C2/c"]},
    *(
        {"name": "transition_pressure", "phases": list(pair), "unit": "GPa", "value": 0}
        for pair in (("C2/c", "R3m"), ("R3m", "Im-3m"))
    ),
    *(
        {"name": name, "phase": "R3m", "pressure_GPa": 150, "unit": unit, "value": 0}
        | {"table_source": "foundation"}
        for name, unit in (("enthalpy_above_lowest", "meV/atom"), ("enthalpy_rank", "1"))
    ),
    *(
        {"name": "critical_pressure", "phase": "Im-3m", "irrep": "T1u", "unit": "GPa", "value": 0}
        | {"method": method, "energies_by": by}
        for method, by in (
            ("harmonic", "model"),
            ("sscha-hessian", "model"),
            ("sscha-hessian", "dft"),
        )
    ),
    *(
        {"name": name, "pressure_GPa": 100, "unit": unit, "value": value}
        for name, unit, value in (
            ("n_with_free_energy", "1", 0),
            ("gibbs_minus_enthalpy", "meV/atom", 0),
            ("reordering_window", "meV/atom", 0),
            ("lowest_space_group", "-", "P1"),
        )
    ),
    {"name": "n_transformed", "space_group": "Im-3m", "pressure_GPa": 100, "unit": "1", "value": 0},
    {"name": "share_kept_by_dft", "space_group": "Im-3m", "unit": "1", "value": 2},
    *(
        {"name": "gradient_error", "phase": "Im-3m", "pressure_GPa": 60, "unit": "meV/A"}
        | {"quantity": quantity, "value": 0}
        for quantity in ("force", "gradient_centroid")
    ),
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A campaign with figures and a validation by the command."""
    folder = tmp_path_factory.mktemp("campaign")
    write_campaign(folder / "campaign")
    (folder / "campaign" / "run.json").write_text(json.dumps({"settings": {}}))
    expected = folder / "expected.yaml"
    values = [{"source": "nowhere", **entry} for entry in WANTED]
    expected.write_text(yaml.safe_dump({"values": values}))
    made, missing = script("figures").make_figures(folder)
    assert made and not missing
    (folder / "alt.json").write_text(json.dumps({one.name: one.alt for one in made}))
    result = CliRunner().invoke(app, ["validate", str(folder), str(expected)])
    assert result.exit_code == 1, result.output
    (folder / "said.txt").write_text(result.output)
    return folder


@pytest.fixture(scope="module")
def validated(campaign):
    """Found values by name."""
    rows = script("validate").validate(campaign, campaign / "expected.yaml")
    assert all(row.verdict != "not in this run" for row in rows)
    return {row.name: row.found for row in rows}


@pytest.fixture(scope="module")
def report(campaign):
    return " ".join(
        line for _, lines in campaign_contents(campaign / "campaign").summary for line in lines
    )


def figure(campaign, name):
    return csv_rows(campaign / "campaign" / "figures" / f"{name}.csv")


def same(validated, *others):
    """Four digits of `validate` against the same number written with as many digits or fewer."""
    for other in others:
        assert float(validated) == pytest.approx(float(other), rel=6e-3), (validated, other)


def test_the_command_stores_what_the_function_finds(campaign, validated):
    rows = csv_rows(campaign / "campaign" / "validation.csv")
    assert {row["name"]: row["found"] for row in rows} == validated
    said = " ".join((campaign / "said.txt").read_text().split())
    for name, found in validated.items():
        assert f"{name}: found {found}" in said


def test_errors_of_models(campaign, validated, report):
    columns = {"energy": "energy_meV_per_atom", "force": "force_meV_per_A", "stress": "stress_GPa"}
    for quantity, column in columns.items():
        lines = {r["model"]: r[column] for r in figure(campaign, "table_1") if r["set"] == "test"}
        word = "forces" if quantity == "force" else quantity
        before, after = re.search(rf"{word} ([\d.e+]+) to ([\d.e+]+)", report).groups()  # type: ignore[union-attr]
        same(validated[f"{quantity}_rmse foundation test"], lines["foundation"], before)
        same(validated[f"{quantity}_rmse finetuned test"], lines["finetuned"], after)


def test_transitions_and_their_sequence(campaign, validated, report):
    lines = figure(campaign, "fig_5_relative_enthalpy-summary")
    alt = json.loads((campaign / "alt.json").read_text())["fig_5_relative_enthalpy"]
    for line in lines:
        below, above = line["below"], line["above"]
        (told,) = re.findall(rf"{above} follows {below} in static enthalpy at ([\d.]+)", report)
        (drawn,) = re.findall(rf"{below} to {above} at ([\d.]+) GPa", alt)
        found = validated[f"transition_pressure {below} to {above}"]
        same(found, line["pressure_GPa"], told, drawn)
    names = [lines[0]["below"], *(line["above"] for line in lines)]
    assert validated["stability_sequence"] == " -> ".join(names)


def test_the_rank_of_a_phase(campaign, validated):
    name = "fig_2_enthalpy_volume-150GPa"
    (line,) = figure(campaign, f"{name}-summary")
    alt = json.loads((campaign / "alt.json").read_text())[name]
    same(validated["enthalpy_rank R3m foundation 150 GPa"], line["rank"])
    above = line["above_lowest_meV_per_atom"]
    same(validated["enthalpy_above_lowest R3m foundation 150 GPa"], above)
    assert f"number {line['rank']} of {line['n_distinct']}, {float(above):.0f} meV/atom" in alt


def test_critical_pressures(campaign, validated, report):
    lines = figure(campaign, "fig_4a_modes-Im-3m-T1u-summary")
    alt = json.loads((campaign / "alt.json").read_text())["fig_4a_modes-Im-3m-T1u"]
    assert len(lines) == 3
    words = {"model": "by the potential", "dft": "by DFT"}
    for line, drawn in zip(lines, re.findall(r"zero at ([\d.]+)", alt), strict=True):
        method, by = line["method"], line["energies_by"]
        head = re.escape(f"({method}, {words[by]}) turns from imaginary to real at ")
        (told,) = re.findall(head + r"([\d.]+)", report)
        found = validated[f"critical_pressure Im-3m T1u {method} {by}"]
        same(found, line["critical_pressure_GPa"], told, drawn)


def test_what_sscha_reorders(campaign, validated, report):
    (line,) = figure(campaign, "fig_6_ranking-100GPa-summary")
    alt = json.loads((campaign / "alt.json").read_text())["fig_6_ranking-100GPa"]
    same(validated["n_with_free_energy 100 GPa"], line["n"])
    same(validated["n_transformed Im-3m 100 GPa"], line["n_transformed_best"])
    same(validated["gibbs_minus_enthalpy 100 GPa"], line["shift"])
    same(validated["reordering_window 100 GPa"], line["window"])
    assert validated["lowest_space_group 100 GPa"] == line["best"]
    kept, checked = line["n_kept_by_dft"], line["n_checked_by_dft"]
    same(validated["share_kept_by_dft Im-3m"], int(kept) / int(checked))
    assert f"{kept} of {checked} relaxed by DFT keep" in alt
    assert f"{kept} of {checked} candidates that SSCHA brings to another" in report
    assert f"{line['n_changed']} of {line['n']} structures changed" in alt
    assert f"{line['n_changed']} of {line['n']} structures changed" in report


def test_errors_of_gradients(campaign, validated, report):
    lines = {
        r["quantity"]: 1e3 * float(r["rmse"])
        for r in figure(campaign, "fig_7_gradient_errors-Im-3m-60GPa")
    }
    many, one = re.search(r"leaves ([\d.]+) of ([\d.]+) meV/Å", report).groups()  # type: ignore[union-attr]
    same(validated["gradient_error Im-3m force 60 GPa"], lines["force"], one)
    same(
        validated["gradient_error Im-3m gradient_centroid 60 GPa"], lines["gradient_centroid"], many
    )
