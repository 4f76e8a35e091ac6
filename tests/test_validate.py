"""Validation of a campaign: every kind of value found in tables made by hand, verdicts, reasons
from the run, and wrong input."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from campaign_tables import ranked
from records import csv_rows
from typer.testing import CliRunner

from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.io.tables import TableFolder
from magus_anharmonic.paper import enthalpies, findings, quantities, script, tables
from magus_anharmonic.ranking.candidate import read_ranking
from magus_anharmonic.report.text import sentences

NAMES, ExpectedValue, load_expected = (
    getattr(script("expected"), name) for name in ("NAMES", "ExpectedValue", "load_expected")
)
FINDERS, validate = script("validate").FINDERS, script("validate").validate

PAPER = Path(__file__).parents[1] / "inputs" / "h3s-paper" / "expected.yaml"

TABLES = {
    "model_errors.csv": (
        """model,model_id,set,n,energy_rmse_eV_per_atom,force_rmse_eV_per_A,stress_rmse_GPa
foundation,f00,test,200,0.0853,0.409,6.88
finetuned,abc,test,200,0.0121,0.136,1.13
"""
    ),
    "enthalpies.csv": (
        """id,phase,formula,natoms,space_group,pressure_GPa,volume_A3_per_atom,enthalpy_eV_per_atom,model_id,source
a,C2/c,H3S,8,C2/c (15),75,4,1.000,abc,relax
b,R3m,H3S,4,R3m (160),75,4,1.006,abc,relax
c,Im-3m,H3S,4,Im-3m (229),75,4,1.030,abc,relax
a,C2/c,H3S,8,C2/c (15),125,4,1.503,abc,relax
b,R3m,H3S,4,R3m (160),125,4,1.501,abc,relax
c,Im-3m,H3S,4,Im-3m (229),125,4,1.511,abc,relax
b,R3m,H3S,4,R3m (160),200,4,2.004,abc,relax
c,Im-3m,H3S,4,Im-3m (229),200,4,2.000,abc,relax
x,,H3S,4,P1 (1),150,4,0.935,f00,foundation
y,,H3S,4,P1 (1),150,4,0.950,f00,foundation
z,R3m,H3S,4,R3m (160),150,4,1.000,f00,foundation
"""
    ),
    "ranking-100GPa.csv": (
        """id,formula,natoms,pressure_GPa,temperature_K,spg_static,spg_quantum,@,n_evaluations,model,status,reason
a,H3S,4,100,0,R3m (160),Im-3m (229),1.000,1.195,0.001,900,abc,stable,
b,H3S,4,100,0,C2/c (15),C2/c (15),1.002,1.205,0.001,900,abc,sscha,
c,H3S,4,100,0,P1 (1),Im-3m (229),1.004,1.196,0.001,900,abc,sscha,
d,H3S,4,100,0,P1 (1),P1 (1),1.060,1.262,0.001,900,abc,sscha,
e,H3S,4,100,0,P2_1 (4),P2_1 (4),1.080,1.281,0.001,900,abc,unconverged,
f,H3S,4,100,0,P-1 (2),P-1 (2),1.100,1.301,0.001,900,abc,eliminated,
g,H3S,4,100,0,P-1 (2),P-1 (2),1.120,1.320,0.001,900,abc,sscha,
h,H3S,4,100,0,P-1 (2),P-1 (2),1.140,1.341,0.001,900,abc,sscha,
i,H3S,4,100,0,Cm (8),Cm (8),1.010,1.100,0.001,900,abc,saddle,
j,H3S,4,100,0,Cm (8),,1.200,,,0,abc,static,
"""
    ),
    "space_groups.csv": (
        """id,pressure_GPa,spg_static,spg_dft,spg_quantum,enthalpy_dft_eV_per_atom,reason
a,100,R3m (160),R3m (160),Im-3m (229),1.0,
c,100,P1 (1),P1 (1),Im-3m (229),1.0,
b,100,C2/c (15),C2/c (15),C2/c (15),1.0,
"""
    ),
    "modes.csv": (
        """phase,space_group,irrep,pressure_GPa,method,energies_by,frequency_squared_cm2,error_cm2,model_id
Im-3m,Im-3m (229),T1u,50,sscha-hessian,model,-500000,20000,abc
Im-3m,Im-3m (229),T1u,100,sscha-hessian,model,20000,20000,abc
Im-3m,Im-3m (229),T1u,150,sscha-hessian,model,400000,20000,abc
Im-3m,Im-3m (229),T1u,50,sscha-hessian,dft,-480000,20000,dft
Im-3m,Im-3m (229),T1u,150,sscha-hessian,dft,480000,20000,dft
Im-3m,Im-3m (229),T1u,150,harmonic,dft,-100000,,dft
Im-3m,Im-3m (229),T1u,160,harmonic,dft,-50000,,dft
"""
    ),
    "gradient_errors.csv": (
        """phase,pressure_GPa,n_configs,quantity,unit,rmse,systematic,statistical,floor
Im-3m,60,60,force,eV/A,0.130,,,
Im-3m,60,60,gradient_centroid,eV/A,0.016,0.003,0.0157,0.0168
"""
    ),
}

STEPS = {
    "relax": {"status": "running"},
    "sscha-100GPa": {"status": "done"},
    "hessian": {"status": "failed", "reason": "no memory"},
}
RUN = {
    "settings": {
        "learning": {
            "labeler": {"calculator": "gpaw", "arguments": {"xc": "PBE"}, "k_spacing": 0.05}
        },
        "sscha": {"supercell": [2, 2, 2], "n_configs": 100},
    }
}


@pytest.fixture
def campaign(tmp_path):
    folder = tmp_path / "campaign" / "tables"
    folder.mkdir(parents=True)
    for name, text in TABLES.items():
        energies = "enthalpy_eV_per_atom,gibbs_eV_per_atom,gibbs_error_eV_per_atom"
        (folder / name).write_text(text.replace("@", energies))
    (tmp_path / "campaign" / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "campaign" / "steps.json").write_text(json.dumps(STEPS))
    return tmp_path


def one(campaign, **entry):
    path = campaign / "e.yaml"
    path.write_text(yaml.safe_dump({"values": [{"source": "a paper", **entry}]}))
    return validate(campaign, path)[0]


TRANSITION = {
    "name": "transition_pressure",
    "phases": ["C2/c", "R3m"],
    "tolerance": 1,
    "unit": "GPa",
}
TRANSFORMED = {"name": "n_transformed", "space_group": "Im-3m", "pressure_GPa": 100, "unit": "1"}


@pytest.mark.parametrize(
    ("entry", "found", "verdict"),
    [
        ({"name": "energy_rmse", "model": "finetuned", "set": "test", "value": 6.7, "error": 0.3, "unit": "meV/atom"}, "12.1", "disagrees"),
        ({"name": "energy_rmse", "model": "finetuned", "set": "test", "value": 0.0125, "unit": "eV/atom"}, "0.0121", "agrees"),
        ({"name": "force_rmse", "model": "finetuned", "set": "test", "value": 200, "unit": "meV/A"}, "136", "agrees"),
        ({"name": "stress_rmse", "model": "foundation", "set": "test", "value": 68.8, "unit": "kbar"}, "68.8", "agrees"),
        ({"name": "stability_sequence", "value": ["P1", "C2/c", "R3m", "Im-3m"], "unit": "-"}, "C2/c -> R3m -> Im-3m", "agrees"),
        ({"name": "stability_sequence", "value": ["R3m", "C2/c", "Im-3m"], "unit": "-"}, "C2/c -> R3m -> Im-3m", "disagrees"),
        ({"name": "transition_pressure", "phases": ["C2/c", "R3m"], "value": 112, "unit": "GPa"}, "112.5", "agrees"),
        ({"name": "transition_pressure", "phases": ["R3m", "Im-3m"], "value": [175, 180], "unit": "GPa"}, "178.6", "agrees"),
        ({"name": "transition_pressure", "phases": ["Im-3m", "R3m"], "value": 90, "unit": "GPa"}, ">200", "disagrees"),
        ({"name": "enthalpy_above_lowest", "phase": "R3m", "pressure_GPa": 150, "table_source": "foundation", "value": 65, "tolerance": 1,
          "unit": "meV/atom"}, "65", "agrees"),
        ({"name": "enthalpy_rank", "phase": "R3m", "pressure_GPa": 150, "table_source": "foundation", "value": 60, "unit": "1"},
         "3", "disagrees"),
        ({"name": "critical_pressure", "phase": "Im-3m", "irrep": "T1u", "method": "sscha-hessian", "energies_by": "model", "value": 98,
          "unit": "GPa"}, "97.74", "agrees"),
        ({"name": "critical_pressure", "phase": "Im-3m", "irrep": "T1u", "method": "harmonic", "energies_by": "dft", "value": 173,
          "unit": "GPa"}, ">160", "agrees"),
        ({"name": "critical_pressure", "phase": "Im-3m", "irrep": "T1u", "method": "harmonic", "energies_by": "dft", "value": 120,
          "unit": "GPa"}, ">160", "disagrees"),
        ({"name": "critical_pressure_difference", "phase": "Im-3m", "irrep": "T1u", "method": "sscha-hessian", "at_most": 10,
          "unit": "GPa"}, "2.256", "agrees"),
        ({**TRANSFORMED, "value": 13, "out_of": 100, "error": 3.4}, "2 of 8", "agrees"),
        ({**TRANSFORMED, "value": 90, "out_of": 100, "error": 3}, "2 of 8", "disagrees"),
        ({"name": "n_with_free_energy", "pressure_GPa": 100, "at_least": 100, "unit": "1"}, "8", "disagrees"),
        ({"name": "lowest_space_group", "pressure_GPa": 100, "value": "Im-3m", "unit": "-"}, "Im-3m", "agrees"),
        ({"name": "share_kept_by_dft", "space_group": "Im-3m", "at_least": 0.5, "unit": "1"}, "1", "agrees"),
        ({"name": "gibbs_minus_enthalpy", "pressure_GPa": 100, "value": 200, "tolerance": 30, "unit": "meV/atom"}, "185.5", "agrees"),
        ({"name": "reordering_window", "pressure_GPa": 100, "at_most": 50, "unit": "meV/atom"}, "10", "agrees"),
        ({"name": "gradient_error", "phase": "Im-3m", "pressure_GPa": 60, "quantity": "force", "value": 128, "unit": "meV/A"},
         "130", "agrees"),
        ({"name": "gradient_error", "phase": "Im-3m", "pressure_GPa": 60, "quantity": "gradient_centroid", "value": 4.5, "unit": "meV/A"},
         "16", "agrees"),
    ],
)  # fmt: skip
def test_every_kind_of_value_is_found_and_judged(campaign, entry, found, verdict):
    row = one(campaign, **entry)
    assert (row.found, row.verdict) == (found, verdict), row.line


def test_gradients_by_force_constants_have_their_own_unit(campaign):
    table = campaign / "campaign" / "tables" / "gradient_errors.csv"
    table.write_text(table.read_text() + "Im-3m,60,60,gradient_force_constants,eV/A^2,0.8,,,\n")
    entry = {
        "name": "gradient_error",
        "phase": "Im-3m",
        "pressure_GPa": 60,
        "quantity": "gradient_force_constants",
        "value": 800,
    }
    assert one(campaign, **entry, unit="meV/A^2").verdict == "agrees"
    with pytest.raises(InputError, match=r"unit of force; allowed: eV/A\^2"):
        one(campaign, **entry, unit="meV/A")


def test_every_name_has_a_finder_and_says_not_in_this_run_without_tables(tmp_path):
    assert set(NAMES) == set(FINDERS)
    (tmp_path / "campaign" / "tables").mkdir(parents=True)
    (tmp_path / "campaign" / "tables" / "nothing.csv").write_text("nothing\n")
    rows = validate(tmp_path, PAPER)
    assert {row.verdict for row in rows} == {"not in this run"} and len(rows) > 35


def test_the_paper_s_numbers_are_in_its_text_order_and_every_entry_has_a_source():
    values = load_expected(PAPER).values
    table = {(v.name, v.model, v.set): v.value for v in values if v.name.endswith("_rmse")}
    assert len(table) == 18
    assert [table["energy_rmse", m, "test"] for m in ("foundation", "finetuned")] == [85.3, 6.7]
    assert [table["stress_rmse", "finetuned", s] for s in ("training", "validation", "test")] == [
        0.48,
        1.14,
        1.13,
    ]
    assert all(v.source for v in values)
    assert {v.name for v in values} == set(NAMES)
    for v in values:
        if v.name.endswith("_rmse"):
            n = 1600 if v.set == "training" else 200
            assert v.error == pytest.approx(v.value / np.sqrt(2 * n), rel=0.12), v.title


def test_a_difference_comes_with_what_the_run_itself_says(campaign):
    row = one(campaign, **TRANSITION, value=130, labels="vasp PBE")
    words = row.could_explain
    assert row.verdict == "disagrees" and row.difference.startswith("-17")
    slope = 0.008 / 50
    assert (
        f"finetuned model 12.1 meV/atom, {np.sqrt(2) * 0.0121 / slope:.1f} GPa here" in words
        and "(200 test labels)" in words
    )
    assert (
        "gpaw xc=PBE k_spacing=0.05" in words
        and "expected vasp PBE" in words
        and "not done: relax (interrupted)" in words
    )
    row = one(campaign, **TRANSFORMED, value=90, out_of=100, error=3, supercell=[3, 3, 3])
    words = row.could_explain
    assert (
        "8 structures, 100 in the expected count" in words
        and "supercell 2x2x2, expected 3x3x3" in words
        and "100 configurations per population at most" in words
    )


def test_reasons_change_with_the_run(campaign):
    (campaign / "campaign" / "run.json").write_text(json.dumps({"settings": {}}))
    (campaign / "campaign" / "tables" / "model_errors.csv").unlink()
    row = one(campaign, **TRANSITION, value=130)
    first, second = row.could_explain.split("; ")
    assert "the value's own error" in first and second == "not done: relax (interrupted)"


def test_rows_of_several_models_and_labels_of_several_settings_are_named(campaign):
    table = campaign / "campaign" / "tables" / "enthalpies.csv"
    table.write_text(table.read_text().replace("1.006,abc", "1.006,xyz"))
    run = {
        "settings": {
            "a": {"labeler": {"calculator": "gpaw"}},
            "b": {"labeler": {"calculator": "vasp"}},
        }
    }
    (campaign / "campaign" / "run.json").write_text(json.dumps(run))
    words = one(campaign, **TRANSITION, value=140).could_explain
    assert (
        "several models: abc, xyz" in words
        and "labels by gpaw (its default settings) and vasp (its" in words
    )


def test_a_transition_knows_its_error():
    def transition(difference):
        rows = [
            tables.Enthalpy(f"{name}{x:g}", name, "H3S", 4, group, x, 5.0, value, "m", "relax")
            for x in (0.0, 1.0, 2.0, 3.0)
            for name, group, value in (("A", "P1 (1)", difference(x)), ("B", "R3m (160)", 0.0))
        ]
        return enthalpies.transition(rows, "A", "B")

    assert transition(lambda x: x - 1.5).pressure_GPa == pytest.approx(1.5)
    curved = transition(lambda x: x**2 - 2.0)
    assert abs(curved.pressure_GPa - np.sqrt(2.0)) < 2.0 * curved.error_GPa
    below, above = transition(lambda x: x + 1.0), transition(lambda x: x - 9.0)
    assert (below.how, below.pressure_GPa) == ("below", 0.0)
    assert (above.how, above.pressure_GPa) == ("above", 3.0)


def tables_of(folder, rows, file):
    tables.write(type(rows[0]), folder / file, rows)
    return TableFolder(folder)


@pytest.mark.parametrize(
    ("squares", "error"),
    [
        ((-4.0e5, -0.3e5, 2.2e5, 4.1e5, 5.5e5), 8e3),
        ((-4.0e5, -0.3e5, 2.2e5, 4.1e5, 5.5e5), None),
        ((-1e5, 0.2e5, -0.3e5, 3e5, 4e5), None),
        ((-1e5, 0.2e5, -0.3e5, 3e5, 4e5), 1e3),
    ],
)
def test_figure_validation_and_report_give_one_critical_pressure(tmp_path, squares, error):
    pressures = [60.0, 100.0, 140.0, 180.0, 220.0]
    rows = [
        tables.Mode("Im-3m", "Im-3m (229)", "T1u", p, "sscha-hessian", "model", y, error, "0" * 12)
        for p, y in zip(pressures, squares, strict=True)
    ]
    (figure,) = quantities.critical_pressures(rows)
    key = {"phase": "Im-3m", "irrep": "T1u", "method": "sscha-hessian", "energies_by": "model"}
    wanted = ExpectedValue(name="critical_pressure", unit="GPa", value=1.0, source="x", **key)
    found = FINDERS["critical_pressure"](wanted, tables_of(tmp_path, rows, "modes.csv"))
    assert figure.critical_pressure_GPa is not None and found is not None
    assert (found.value, found.error) == (figure.critical_pressure_GPa, figure.error_GPa)
    if len([1 for a, b in pairwise(squares) if a < 0 <= b]) > 1:
        assert 140.0 < found.value < 180.0, (
            "above the highest change of sign the structure is stable"
        )
    (sentence,) = findings.modes(tmp_path)
    assert f"{found.value:.1f}" in sentence and (
        error is None or f"± {found.error:.1f} GPa" in sentence
    )


@pytest.mark.parametrize("n_inside", [0, 4])
def test_figure_and_validation_give_one_reordering_window(tmp_path, n_inside):
    rng = np.random.default_rng(n_inside)
    h = np.concatenate([[0, 5, 12, 20, 31, 44], np.linspace(60, 300, 30)])
    g = 200 + 0.97 * h + rng.normal(0, 0.4, len(h))
    g[:n_inside] -= 4.0
    rows = [
        ranked(f"{i:012x}", "P1 (1)", a / 1e3, b / 1e3, gibbs_error=2e-4, model="0" * 12)
        for i, (a, b) in enumerate(zip(h, g, strict=True))
    ]
    window = quantities.reordering(rows)[0].window
    wanted = ExpectedValue(
        name="reordering_window", unit="meV/atom", value=50.0, source="x", pressure_GPa=100.0
    )
    found = FINDERS["reordering_window"](
        wanted, tables_of(tmp_path, rows, tables.ranking_file(100.0))
    )
    assert found is not None and 1e3 * found.value == pytest.approx(window)
    assert window == pytest.approx(h[n_inside - 1] if n_inside else 0.0), (
        "4 meV off a line with a scatter of 0.4 is off the line"
    )


def test_figure_validation_and_report_count_the_same_changes_of_space_group(tmp_path):
    """The fault: an undecided group counted as the lower of the two in figure 6 and `validate`, and
    as no change in the report."""
    groups = (
        ["Im-3m (229)"] * 5
        + ["R3m (160)"] * 3
        + ["Im-3m (229) or Pm-3m (221): not decided, 1.2 sigma"] * 4
        + ["P1 (1)"] * 6
    )
    states = ["converged", "saddle", "stable", "eliminated"]
    rows = [
        ranked(f"{i:012x}", group, i / 1e3, 0.2 + i / 1e3, status=states[i % 4])
        for i, group in enumerate(groups)
    ]
    figure = quantities.reordering(rows)[0]
    wanted = ExpectedValue(
        name="n_transformed", unit="1", value=5, source="x", space_group="Im-3m", pressure_GPa=100.0
    )
    found = FINDERS["n_transformed"](wanted, tables_of(tmp_path, rows, tables.ranking_file(100.0)))
    words = " ".join(sentences(read_ranking(tmp_path / tables.ranking_file(100.0))))
    assert (
        (figure.n, figure.n_changed, figure.best, figure.n_transformed_best) == (18, 8, "Im-3m", 5)
        and found is not None
        and found.value == 5
    )
    assert "8 of 18 structures changed their space group with SSCHA, 5 of them to Im-3m." in words


def test_figure_and_validation_give_one_transition_pressure_where_the_lines_cross_three_times(
    tmp_path,
):
    """The fault: `validate` took the first of several crossings; above the last one the second
    phase is the lower one."""
    rows = [
        tables.Enthalpy(f"{name}{p:g}", name, "H3S", 4, group, p, 5.0, value, "0" * 12, "relax")
        for name, group, values in (
            ("A", "P1 (1)", [0.0] * 4),
            ("B", "R3m (160)", [0.01, -0.02, 0.03, -0.04]),
        )
        for p, value in zip([60.0, 100.0, 140.0, 180.0], values, strict=True)
    ]
    figure = [
        change.pressure_GPa
        for change in enthalpies.transitions(rows)
        if (change.below, change.above) == ("A", "B")
    ]
    wanted = ExpectedValue(
        name="transition_pressure", unit="GPa", value=1.0, source="x", phases=["A", "B"]
    )
    found = FINDERS["transition_pressure"](wanted, tables_of(tmp_path, rows, "enthalpies.csv"))
    assert len(figure) == 2 and found is not None and found.value == pytest.approx(figure[-1])


def run(*arguments):
    result = CliRunner().invoke(app, ["validate", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_exit_codes_and_files(campaign):
    good = {
        "name": "lowest_space_group",
        "pressure_GPa": 100,
        "value": "Im-3m",
        "unit": "-",
        "source": "Fig. 6",
    }
    absent = {
        "name": "lowest_space_group",
        "pressure_GPa": 300,
        "value": "Im-3m",
        "unit": "-",
        "source": "Fig. 6",
    }
    path = campaign / "e.yaml"
    path.write_text(yaml.safe_dump({"values": [good, absent]}))
    code, text = run(str(campaign), str(path))
    assert code == 0 and "1 agree, 0 disagree, 1 not in this run" in text
    path.write_text(yaml.safe_dump({"values": [good, {**good, "value": "R3m"}]}))
    code, text = run(str(campaign), str(path))
    assert (
        code == 1
        and re.search(r"DISAGREES +lowest_space_group", text)
        and "could explain it" in text
    )
    stored = json.loads((campaign / "campaign" / "validation.json").read_text())
    assert [row["verdict"] for row in stored["values"]] == ["agrees", "disagrees"] and stored[
        "counts"
    ]["disagrees"] == 1
    lines = csv_rows(campaign / "campaign" / "validation.csv")
    assert [line["verdict"] for line in lines] == ["agrees", "disagrees"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"name": "energy_rms", "unit": "eV/atom", "value": 1},
            ["energy_rms", "did you mean energy_rmse"],
        ),
        (
            {
                "name": "energy_rmse",
                "unit": "meV/atm",
                "value": 1,
                "model": "finetuned",
                "set": "test",
            },
            ["meV/atm", "did you mean meV/atom"],
        ),
        (
            {"name": "energy_rmse", "unit": "eV/atom", "value": 1, "model": "finetuned"},
            ["needs set"],
        ),
        (
            {"name": "transition_pressure", "unit": "GPa", "value": 1, "phases": ["a"]},
            ["phases", "two"],
        ),
        (
            {"name": "lowest_space_group", "unit": "-", "value": 3, "pressure_GPa": 100},
            ["must be a name"],
        ),
        (
            {"name": "n_with_free_energy", "unit": "1", "pressure_GPa": 100},
            ["one of value, at_least, at_most"],
        ),
        (
            {"name": "n_with_free_energy", "unit": "1", "pressure_GPa": 100, "valu": 5},
            ["valu", "did you mean value"],
        ),
    ],
)
def test_a_wrong_expectation_ends_with_code_2(campaign, entry, words):
    (campaign / "e.yaml").write_text(yaml.safe_dump({"values": [{"source": "x", **entry}]}))
    code, text = run(str(campaign), str(campaign / "e.yaml"))
    assert code == 2 and all(word in text for word in words), text


def test_wrong_folders_and_tables_end_with_code_2(campaign, tmp_path):
    (tmp_path / "nothing").mkdir()
    for folder, word in (("nothing", "no campaign"), ("nowhere", "no such folder")):
        code, text = run(str(tmp_path / folder), str(PAPER))
        assert code == 2 and word in text
    table = campaign / "campaign" / "tables" / "enthalpies.csv"
    good = table.read_text()
    table.write_text(good.replace("enthalpy_eV_per_atom", "enthalpy_meV_per_atom"))
    code, text = run(str(campaign), str(PAPER))
    assert (
        code == 2
        and "enthalpies.csv: column enthalpy_meV_per_atom: wrong unit" in text
        and "column enthalpy_eV_per_atom" in text
    )
    table.write_text(good.replace("space_group", "symmetry"))
    code, text = run(str(campaign), str(PAPER))
    assert code == 2 and "enthalpies.csv: column space_group is missing" in text
    table.write_text(good.replace("1.503", "1,503"))
    code, text = run(str(campaign), str(PAPER))
    assert code == 2 and "enthalpies.csv: line 5" in text
    assert run()[0] == 2


def test_a_table_with_another_unit_is_refused(campaign):
    table = campaign / "campaign" / "tables" / "gradient_errors.csv"
    table.write_text(table.read_text().replace("force,eV/A", "force,meV/A"))
    with pytest.raises(InputError, match="line 2.*must be in eV/A"):
        one(
            campaign,
            name="gradient_error",
            phase="Im-3m",
            pressure_GPa=60,
            quantity="force",
            value=128,
            unit="meV/A",
        )


MERGED = """id,phase,formula,natoms,space_group,pressure_GPa,volume_A3_per_atom,enthalpy_eV_per_atom,model_id,source
b,R3m,H3S,4,R3m (160),100,4.10,1.000000,abc,relax
c,Im-3m,H6S2,8,Im-3m (229),100,4.00,1.006000,abc,relax
b,R3m,H3S,4,Im-3m (229),150,3.60,1.500003,abc,relax
c,Im-3m,H6S2,8,Im-3m (229),150,3.60,1.500000,abc,relax
b,R3m,H3S,4,Im-3m (229),200,3.30,2.000000,abc,relax
c,Im-3m,H6S2,8,Im-3m (229),200,3.30,2.000002,abc,relax
"""


@pytest.mark.parametrize(
    ("value", "difference", "verdict"),
    [([175, 180], "-25", "disagrees"), ([140, 145], "+0", "agrees")],
)
def test_a_phase_that_relaxes_into_another_brackets_the_transition(
    campaign, value, difference, verdict
):
    """The crossing that the noise of the relaxations makes at 150 GPa would have an error of 0.1
    GPa."""
    (campaign / "campaign" / "tables" / "enthalpies.csv").write_text(MERGED)
    row = one(
        campaign, name="transition_pressure", phases=["R3m", "Im-3m"], value=value, unit="GPa"
    )
    assert (row.found, row.error, row.difference, row.verdict) == (
        "100 to 150",
        "",
        difference,
        verdict,
    )
    assert "relaxes into the second" in row.remark
    assert verdict == "agrees" or "between 100 and 150 GPa was relaxed" in row.could_explain
    sequence = one(campaign, name="stability_sequence", value=["C2/c", "R3m", "Im-3m"], unit="-")
    assert (sequence.found, sequence.verdict) == (
        "R3m -> Im-3m",
        "agrees",
    ) and "R3m -> Im-3m" in sequence.line


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"name": "transition_pressure", "phases": ["C2/c", "Pnma"], "value": 1, "unit": "GPa"}, "no phase Pnma (it has C2/c, Im-3m, R3m)"),
        ({"name": "enthalpy_rank", "phase": "R3m", "pressure_GPa": 60, "value": 1, "unit": "1"},
         "enthalpies.csv has it at 75, 125, 200 GPa"),
        ({"name": "energy_rmse", "model": "finetuned", "set": "training", "value": 1, "unit": "eV/atom"}, "no set training (it has test)"),
        ({"name": "lowest_space_group", "pressure_GPa": 300, "value": "R3m", "unit": "-"},
         "no ranking at this pressure (100 GPa there is)"),
        ({"name": "critical_pressure", "phase": "Im-3m", "irrep": "A1", "method": "harmonic", "energies_by": "dft", "value": 1,
          "unit": "GPa"},
         "no irrep A1 (it has T1u)"),
        ({"name": "gradient_error", "phase": "Im-3m", "pressure_GPa": 60, "quantity": "bo_force_centroid", "value": 1, "unit": "eV/A"},
         "no quantity bo_force_centroid"),
    ],
)  # fmt: skip
def test_what_is_not_in_a_run_says_why(campaign, entry, reason):
    row = one(campaign, **entry)
    assert row.verdict == "not in this run" and reason in row.line, row.line


def test_what_is_missing_altogether_is_named(campaign):
    (campaign / "campaign" / "tables" / "gradient_errors.csv").unlink()
    entry = {
        "name": "gradient_error",
        "phase": "Im-3m",
        "pressure_GPa": 60,
        "quantity": "force",
        "value": 128,
        "unit": "meV/A",
    }
    assert (
        "there is no gradient_errors.csv; not done: hessian (failed: no memory)"
        in one(campaign, **entry).line
    )


def test_numbers_come_with_what_one_must_know_to_read_them(campaign):
    better = one(
        campaign, name="force_rmse", model="finetuned", set="test", value=200, unit="meV/A"
    )
    assert "less than expected counts as agreement; 200 labels" in better.line
    bound = one(
        campaign,
        name="critical_pressure",
        phase="Im-3m",
        irrep="T1u",
        method="harmonic",
        energies_by="dft",
        value=173,
        unit="GPa",
    )
    assert (
        "found above 160" in bound.line
        and "does not change sign between the pressures of the run" in bound.line
    )
    (campaign / "campaign" / "run.json").write_text(
        json.dumps({"settings": {"foundation": "h3s-gpaw-small"}})
    )
    entry = {
        "table_source": "foundation",
        "phase": "R3m",
        "pressure_GPa": 150,
        "value": 20,
        "unit": "meV/atom",
        "foundation": "mattersim-1M",
    }
    words = one(campaign, name="enthalpy_above_lowest", **entry).could_explain
    assert "foundation model h3s-gpaw-small, expected mattersim-1M" in words
    assert "RMSE of the foundation model 85.3 meV/atom" in words, (
        "not the error of the finetuned model"
    )
