"""Names with brackets and colons are printed as they are: they are no markup of the screen."""

import ast
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import magus_anharmonic.cli
from magus_anharmonic.cli import app
from magus_anharmonic.cli.physics import _show as show_errors
from magus_anharmonic.cli.physics import _show_hessian
from magus_anharmonic.report.screen import show_ranking

NAME = "out[bold]x[ok][/bold] :smile:"
COLUMNS = "id,formula,natoms,pressure_GPa,temperature_K,spg_static,spg_quantum"
ENERGIES = "enthalpy_eV_per_atom,gibbs_eV_per_atom,gibbs_error_eV_per_atom,status,reason"
RANKING = f"{COLUMNS},{ENERGIES}\n[/bold]a,Cu,1,10,0,Fm-3m (225),Fm-3m (225),1,1,0.1,stable,\n"


def test_the_folder_of_a_ranking_is_printed_as_it_is(tmp_path, capsys):
    folder = tmp_path / NAME.replace("/", "")
    folder.mkdir()
    (folder / "ranking.csv").write_text(RANKING)
    show_ranking(folder)
    shown = capsys.readouterr().out
    assert (
        f"Everything else: {folder.resolve()}" in shown
        and f"Picture: {folder / 'ranking.png'}" in shown
        and " [/bold]a " in shown
    )


def test_the_phase_of_errors_is_printed_as_it_is(tmp_path, capsys):
    parts = SimpleNamespace(
        single=1.0, mean=1.0, systematic=1.0, systematic_error=1.0, statistical=1.0, floor=1.0
    )
    names = ("centroid", "symmetric_centroid", "force_constants", "symmetric_force_constants")
    errors = SimpleNamespace(
        n_configs=4, force=1.0, bo_centroid=None, **dict.fromkeys(names, parts)
    )
    orders = {"first_order": 0.0, "first_order_error": 0.0, "second_order": 0.0}
    correction = SimpleNamespace(**orders, electronic=None)
    source = SimpleNamespace(phase=NAME, pressure=10.0)
    folder = tmp_path / "[/red]"
    show_errors(
        SimpleNamespace(
            source=source,
            errors=errors,
            correction=correction,
            corrected_gibbs=None,
            n_failed=0,
            folder=folder,
        )
    )
    shown = capsys.readouterr().out
    assert f"{NAME} at 10 GPa" in shown and f"Everything else: {folder}" in shown


def test_the_folder_and_the_words_of_a_hessian_are_printed_as_they_are(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "magus_anharmonic.sscha.report.softest_levels", lambda hessian: [("[/q]", "1", "2", "3")]
    )
    _show_hessian(
        SimpleNamespace(
            hessian=None, sentences=lambda: [f"{NAME} is a minimum"], folder=tmp_path / NAME
        )
    )
    shown = capsys.readouterr().out
    assert (
        f"* {NAME} is a minimum" in shown
        and f"Everything else: {tmp_path / NAME}" in shown
        and "[/q]" in shown
    )


def test_the_steps_of_a_campaign_are_printed_as_they_are(tmp_path, monkeypatch):
    found = SimpleNamespace(
        columns=("step", "remark"), rows=[("sscha", NAME)], missing=[f"{NAME}: no result"]
    )
    module = import_module("magus_anharmonic.campaign.run")
    monkeypatch.setattr(module, "campaign_file", lambda path: Path(path))
    monkeypatch.setattr(module, "status", lambda path: found)
    result = CliRunner().invoke(app, ["campaign", "--status", f"{tmp_path}/a[bold]b.yaml"])
    assert result.exit_code == 0, result.exception
    assert f"* {NAME}: no result" in result.output and f" {NAME} " in result.output
    assert "a[bold]b.yaml" in "".join(result.output.split()), (
        "a title that is longer than the table goes on in the next line"
    )


def test_doctor_prints_what_it_found_as_it_is(monkeypatch):
    from magus_anharmonic.doctor import Check

    checks = [
        Check("labeler", True, f"command '{NAME}'"),
        Check("checkpoint", False, "[/red]", "fix [it]", True),
        Check("other", None, ""),
    ]
    monkeypatch.setattr("magus_anharmonic.doctor.collect", lambda settings: checks)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert (
        f"'{NAME}'" in result.output and "[/red]" in result.output and "fix [it]" in result.output
    )
    assert "ok" in result.output and "missing" in result.output and "[green]" not in result.output


@pytest.mark.parametrize(
    "arguments", [["search", "-i", "[/bold].yaml"], ["rank", "[/bold].xyz"]], ids=["search", "rank"]
)
def test_a_message_about_a_name_with_brackets_is_no_traceback(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
    assert "[/bold]" in result.output


def test_every_command_prints_through_the_console_without_markup():
    makers = []
    for file in sorted(Path(magus_anharmonic.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Console", "Screen"):
                makers.append(
                    (
                        file.name,
                        {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
                    )
                )
    screens = [(name, keywords) for name, keywords in makers if "stderr" not in keywords]
    assert [name for name, _ in screens] == ["screen.py"]
    assert screens[0][1]["markup"] == screens[0][1]["emoji"] == "False"
