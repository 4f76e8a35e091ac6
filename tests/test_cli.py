"""The command line: help to learn from, wrong input ends with exit code 2, one clear message and no
traceback."""

import copy
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from ase import Atoms
from ase.io import write
from rich.table import Table
from typer.testing import CliRunner

from magus_anharmonic.cli import app, main
from magus_anharmonic.cli.common import configure_logging, console, say, user_errors
from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.plugins.parameters import RestartSafe

QUICKSTART = Path(__file__).parents[1] / "inputs" / "h3s-quickstart" / "input.yaml"


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def changed(path, value):
    """The quick start's input with one key changed."""
    data = copy.deepcopy(yaml.safe_load(QUICKSTART.read_text()))
    block = data
    for part in path[:-1]:
        block = block.setdefault(part, {})
    block[path[-1]] = value
    return data


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("search",),
        ("rank",),
        ("hessian",),
        ("train",),
        ("doctor",),
        ("phase-diagram",),
        ("validate",),
    ],
)
def test_help_explains_every_command(command):
    code, text = run(*command, "--help")
    assert code == 0 and "Usage" in text


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("presure",), 150, ["presure", "pressure"]),
        (("pressure",), 1.5e11, ["pressure", "Pa", "150 GPa"]),
        (("pressure",), -5, ["pressure", "negative"]),
        (("symbols",), ["H", "Xx"], ["symbols", "Xx"]),
        (("sscha", "n_configs"), 7, ["sscha.n_configs", "even"]),
        (("sscha", "temperature"), -3, ["sscha.temperature", "0 K"]),
        (("sscha", "nConfig"), 100, ["sscha.nConfig", "n_configs"]),
        (("MainCalculator", "checkpoint"), "nowhere.pth", ["checkpoint", "nowhere.pth"]),
        (("learning", "labeler"), {}, ["learning.labeler"]),
        (
            ("learning",),
            {"labeler": {"calculator": "no.such.Code"}},
            ["learning.labeler", "no.such", "not installed"],
        ),
        (("learning", "dataset"), "nowhere.xyz", ["dataset", "nowhere.xyz"]),
        (("sscha", "engine"), "natif", ["sscha.engine", "python-sscha"]),
        (("formulaType",), "var", ["formulaType: var", "one list per unit"]),
    ],
)
def test_a_wrong_key_or_value_stops_the_search_before_any_work(folder, path, value, words):
    (folder / "input.yaml").write_text(yaml.safe_dump(changed(path, value)))
    code, text = run("search", "-i", "input.yaml", "--host", "embedded")
    assert code == 2, text
    assert "Traceback" not in text
    assert all(word in text for word in words), text
    assert [file.name for file in folder.iterdir()] == ["input.yaml"], "something was left behind"


def test_an_input_that_is_missing_or_no_yaml_is_named(folder):
    assert run("search", "-i", "absent.yaml", "--host", "embedded")[0] == 2
    (folder / "input.yaml").write_text("symbols: [H, S\n")
    code, text = run("search", "-i", "input.yaml", "--host", "embedded")
    assert code == 2 and "input.yaml" in text


def test_magus_is_refused_by_name_when_it_is_not_installed(folder, monkeypatch):
    import magus_anharmonic.doctor as doctor

    monkeypatch.setattr(doctor, "magus_version", lambda: None)
    (folder / "input.yaml").write_text(QUICKSTART.read_text())
    code, text = run("search", "--host", "magus")
    assert code == 2 and "pip install git+https://gitlab.com/bigd4/magus.git" in text


def test_the_keys_of_the_embedded_host_are_listed():
    code, text = run("search", "--keys")
    assert code == 0 and "popSize" in text and "spacegroup" in text


def test_the_doctor_fails_only_for_what_the_input_needs(folder):
    (folder / "input.yaml").write_text(
        yaml.safe_dump(changed(("MainCalculator", "checkpoint"), "nowhere.pth"))
    )
    assert run("doctor")[0] == 0
    code, text = run("doctor", "-i", "input.yaml")
    assert code == 1 and "nowhere.pth" in text


# --------------------------------------------------------------------- rank from dynamical matrices


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """Dynamical matrices and an ensemble of fcc copper, as an SSCHA user has them; the forces are
    EMT's."""
    import numpy as np
    from ase.build import bulk
    from ranking_fakes import Emt
    from sscha_models import evaluated

    from magus_anharmonic.sscha.qe_files import write_dyn, write_ensemble
    from magus_anharmonic.sscha.start import harmonic_force_constants
    from magus_anharmonic.sscha.state import SschaState
    from magus_anharmonic.sscha.symmetry import Symmetry

    folder = tmp_path_factory.mktemp("brought")
    atoms = bulk("Cu")
    symmetry = Symmetry(atoms, (2, 2, 2))
    state = SschaState(
        atoms, (2, 2, 2), 1.3 * harmonic_force_constants(atoms, (2, 2, 2), symmetry, Emt()), 300.0
    )
    write_dyn(state, folder / "dyn")
    ensemble = evaluated(state, Emt(), 200)
    write_ensemble(state, ensemble, folder / "data")
    write_ensemble(state, ensemble.part(slice(5)), folder / "odd")
    heavy = atoms.copy()
    heavy.set_masses([70.0])
    write_dyn(SschaState(heavy, (2, 2, 2), state.force_constants, 300.0), folder / "isotope")
    assert np.isfinite(ensemble.energies).all()
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["--start-dyn"]),
        (("a.xyz", "--start-dyn", "dyn"), ["a.xyz", "leave the file out"]),
        (("--start-dyn", "nowhere/dyn"), ["nowhere/dyn1", "no such file"]),
        (("--load-ensemble", "nowhere"), ["nowhere", "no such folder"]),
        (("--load-ensemble", "."), ["energies_popN.npy"]),
        (("--load-ensemble", "odd"), ["odd", "mirror image", "configuration 5"]),
        (("--start-dyn", "isotope", "--load-ensemble", "data"), ["isotope", "data", "masses"]),
    ],
)
def test_a_start_that_cannot_be_used_is_one_clear_line(
    brought, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(brought)
    code, text = run("rank", *arguments, "--temperature", "300", "-o", str(tmp_path / "out"))
    *logged, refused = text.strip().splitlines()
    assert code == 2 and all(word in refused for word in words), text
    assert all(" INFO " in line for line in logged), text
    assert not (tmp_path / "out").exists()


def test_minimising_on_the_ensemble_that_was_brought_mends_the_force_constants(brought, caplog):
    """30 per cent too stiff on purpose; EMT copper at 300 K is nearly harmonic."""
    import numpy as np

    from magus_anharmonic.ranking.structures import read_start

    before = read_start(str(brought / "dyn"), None, 300.0, 0.0, 0.5)
    with caplog.at_level("INFO"):
        after = read_start(None, brought / "data", 300.0, 0.0, 0.5)
    assert after.supercell_matrix == before.supercell_matrix == (2, 2, 2)
    ratio = np.median(after.modes.hbar_omega / before.modes.hbar_omega)
    assert ratio == pytest.approx(1.3**-0.5, abs=0.04)
    assert "200 configurations, F = " in caplog.text and "GPa" in caplog.text
    heavy = read_start(str(brought / "isotope"), None, 300.0, 0.0, 0.5)
    assert heavy.modes.hbar_omega == pytest.approx(
        before.modes.hbar_omega * (63.546 / 70.0) ** 0.5, rel=1e-4
    ), "masses are those of the files"


def test_a_ranking_starts_from_the_state_that_was_brought(brought, tmp_path):
    """No static relaxation and no harmonic start: the evaluations are those of populations and of
    the stress response."""
    from ranking_fakes import Emt

    from magus_anharmonic.ranking.structures import rank_structures, read_start
    from magus_anharmonic.settings import parse_settings
    from magus_anharmonic.structures import stripped, structure_id

    state = read_start(None, brought / "data", 300.0, 0.0, 0.5)
    block = {
        "temperature": 300,
        "supercell": [2, 2, 2],
        "n_configs": 40,
        "max_populations": 3,
        "cell": "fixed",
        "allocation": "fixed",
    }
    settings = parse_settings({"Fitness": ["SSCHA"], "sscha": {**block, "hessian": 0}})
    atoms = stripped(state.atoms)
    (found,) = rank_structures(
        [atoms],
        Emt(),
        settings,
        tmp_path,
        relax=False,
        workers=1,
        starts={structure_id(atoms): state},
    )
    assert found.gibbs is not None and found.free_energy.n_evaluations % 40 == 0, found.reason
    assert found.enthalpy == pytest.approx(float(Emt().evaluate([atoms]).energy[0]))


def test_an_interrupt_before_a_command_has_begun_is_one_word(monkeypatch, capsys):
    """Found by the soak: while the options are read nothing of ours runs yet that could say it."""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("magus_anharmonic.cli.app", interrupted)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("n_populations", [0, 1], ids=["all fail", "not converged"])
def test_a_ranking_without_any_free_energy_ends_with_another_code(
    folder, monkeypatch, n_populations, tiny_checkpoint
):
    """A job script sees it; where there is one, converged or not, the code is 0."""
    from magus_anharmonic.errors import SschaError
    from magus_anharmonic.sscha import run as sscha_run

    def fail(self):
        raise SschaError("the sample collapses")

    if not n_populations:
        monkeypatch.setattr(sscha_run.SschaRun, "advance", fail)
    write("a.xyz", Atoms("SiC", positions=[[0, 0, 0], [1.5] * 3], cell=[3.0] * 3, pbc=True))
    options = (
        "--supercell",
        "1",
        "1",
        "1",
        "--n-configs",
        "20",
        "--max-populations",
        "1",
        "--fixed-cell",
        "--hessian",
        "0",
        "-o",
        "out",
    )
    code, text = run("rank", "a.xyz", "--checkpoint", str(tiny_checkpoint), *options)
    assert "ranking.csv" in {path.name for path in (folder / "out").iterdir()}
    if n_populations:
        assert code == 0, text
    else:
        assert (
            code == 1
            and "no structure has a free energy" in text
            and "the sample collapses" in text
        ), text


EVIL = "\x1b]0;owned\x07 \x1b[2J \x9b31m \r over \u202e txt\x08\x7f"
"""Title of the window, an empty screen, colour, a line written over, letters turned round, steps
back."""


def _harmless(text):
    return not set(text) & set("\x1b\x07\x9b\r\u202e\x08\x7f")


def test_nothing_that_comes_from_a_file_controls_the_terminal(capsys):
    """Reasons of labels, names of isotopes and phases, messages of other codes: by the log, by
    tables and sentences, by errors."""
    configure_logging(logging.DEBUG)
    try:
        log = logging.getLogger("magus_anharmonic.test")
        log.warning("the label failed: %s", EVIL)
        try:
            raise ValueError(EVIL)
        except ValueError:
            log.debug("why", exc_info=True)
        table = Table(title=EVIL)
        table.add_column(EVIL)
        table.add_row(EVIL)
        console().print(table)
        console().print(EVIL)
        for error in (
            InputError(EVIL),
            MagusAnharmonicError(EVIL),
            OSError(28, "No space left", EVIL),
        ):
            with pytest.raises(typer.Exit), user_errors():
                raise error
        say(EVIL)
    finally:
        logging.getLogger().handlers[:] = [
            h for h in logging.getLogger().handlers if h.get_name() != "magus-anharmonic"
        ]
        logging.getLogger("magus_anharmonic").setLevel(logging.NOTSET)
    shown = capsys.readouterr()
    assert (
        shown.out.count("owned") >= 4
        and shown.err.count("owned") >= 5
        and _harmless(shown.out + shown.err)
    )


def test_colours_of_our_own_still_reach_a_terminal():
    screen = type(console())(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=80
    )
    screen.print("ranked", style="bold red")
    screen.print(EVIL, highlight=False)
    written = screen.file.getvalue()
    own = "\x1b[1;31mranked\x1b[0m"
    assert own in written and "owned" in written and _harmless(written.replace(own, ""))


def test_under_magus_too(caplog):
    record = logging.LogRecord(
        "magus_anharmonic.x", logging.WARNING, "", 0, "reason: %s", (EVIL,), None
    )
    RestartSafe().filter(record)
    assert "owned" in record.getMessage() and _harmless(record.getMessage())


# ------------------------------------------------------------------------------- files of a user


def test_files_are_ranked_with_the_calculator_of_an_import_path_and_keys_of_a_file(
    tmp_path, monkeypatch
):
    from ase.build import bulk

    monkeypatch.chdir(tmp_path)
    for name, a in (("fcc", 3.6), ("hcp", 2.55)):
        write(tmp_path / f"copper-{name}.vasp", bulk("Cu", name, a=a))
    (tmp_path / "keys.yaml").write_text(
        "pressure: 5\nscheduler: serial\n"
        "sscha: {supercell: [1, 1, 1], n_configs: 8, max_populations: 1, hessian: 0}\n"
    )
    options = ("-i", "keys.yaml", "--calculator", "ase.calculators.emt.EMT", "--n-configs", "10")
    code, text = run("rank", "copper-fcc.vasp", "copper-hcp.vasp", *options)
    assert (tmp_path / "ranking/ranking.csv").is_file(), text
    record = json.loads((tmp_path / "ranking/run.json").read_text())
    assert record["settings"]["pressure"] == 5
    assert record["settings"]["sscha"]["n_configs"] == 10
    assert record["settings"]["sscha"]["supercell"] == [1, 1, 1]
    assert record["model"].startswith("emt-")
    assert record["structures"] == ["copper-fcc.vasp", "copper-hcp.vasp"]
    from magus_anharmonic.ranking.candidate import read_ranking

    rows = read_ranking(tmp_path / "ranking/ranking.csv")
    assert {"copper-fcc.vasp", "copper-hcp.vasp"} <= {row.name for row in rows}
    assert "copper-hcp.vasp" in text


def test_hessian_and_errors_take_calculator_labeler_and_keys_from_a_file(folder):
    """The same file for both; an option goes before it. -q: no word on the screen."""
    from ase.build import bulk

    write("cu.vasp", bulk("Cu", a=3.6))
    write("two.xyz", [bulk("Cu", a=3.6), bulk("Cu", a=3.6)], format="extxyz")
    lj = "{calculator: ase.calculators.lj.LennardJones, arguments: {sigma: 2.2}, n_workers: 1}"
    Path("keys.yaml").write_text(
        "pressure: 5\nscheduler: serial\nMainCalculator: {calculator: ase.calculators.emt.EMT}\n"
        "sscha: {supercell: [2, 1, 1], n_configs: 8, max_populations: 2, hessian: 0}\n"
        f"learning: {{labeler: {lj}}}\n"
    )
    code, text = run("hessian", "two.xyz", "-i", "keys.yaml")
    assert code == 2 and "give one, e.g. two.xyz@0" in text
    code, text = run("hessian", "two.xyz@1", "-i", "keys.yaml", "--max-populations", "1", "-q")
    assert code == 0 and all(" WARNING " in line for line in text.splitlines()), text
    result = json.loads(Path("hessian/sscha/result.json").read_text())
    assert result["target_pressure"] == 5 and result["n_populations"] == 1
    code, text = run("errors", "hessian/sscha", "-i", "keys.yaml", "-n", "4")
    assert code == 0 and "Fm-3m at 5 GPa" in text, text
    code, text = run("errors", "hessian/sscha", "-n", "4", "-o", "no")
    assert code == 2 and "--reference" in text
    Path("keys.yaml").write_text("presure: 5\ndE: 0.01\nlearning: {labeler: {calculator: gpaw}}\n")
    for command in ("rank", "hessian", "errors"):
        code, text = run(command, "cu.vasp", "-i", "keys.yaml", "-o", "no")
        assert code == 2 and text.splitlines() == [
            "input error: presure: unknown key; did you mean pressure?"
        ]


def test_training_takes_seed_start_and_stage_from_a_file(folder, tiny_checkpoint, monkeypatch):
    from magus_anharmonic.potential import train

    asked = []
    monkeypatch.setattr(
        train, "train_file", lambda labels, out, recipe, device: asked.append((recipe, device))
    )
    Path("keys.yaml").write_text(
        f"seed: 4\nMainCalculator: {{calculator: mattersim, checkpoint: {tiny_checkpoint},"
        " device: cpu}\nlearning: {labeler: {calculator: gpaw}, epochs: 7, loss: mse}\n"
    )
    Path("recipe.yaml").write_text("split: [2, 1, 1]\nstages: [{epochs: 9}]\n")
    run("train", "labels.xyz", "-i", "keys.yaml", "--learning-rate", "1e-3")
    run("train", "labels.xyz", "-i", "keys.yaml", "--recipe", "recipe.yaml")
    (first, device), (second, _) = asked
    assert (first.seed, first.checkpoint, device) == (4, str(tiny_checkpoint), "cpu")
    (stage,) = first.stages
    assert (stage.epochs, stage.loss, stage.learning_rate) == (7, "mse", 1e-3)
    assert second.seed == 4 and second.split == (2, 1, 1) and second.stages[0].epochs == 9


def test_the_defaults_that_the_help_shows_are_those_of_the_settings(monkeypatch):
    from magus_anharmonic.settings import SschaSettings

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(SschaSettings.model_fields["n_configs"], "default", 1234)
    for command in ("rank", "hessian", "phase-diagram"):
        code, text = run(command, "-h")
        assert code == 0 and "[default: 1234]" in text and "[default: 2, 2, 2]" in text
    assert "[default: mattersim-v1.0.0-1M]" in run("errors", "-h")[1]


def test_the_version_is_shown_in_every_spelling(monkeypatch):
    from magus_anharmonic import __version__

    for word in ("--version", "-V"):
        code, text = run(word)
        assert (code, text.split()) == (0, ["magus-anharmonic", __version__])
    found = subprocess.run(
        [sys.executable, "-m", "magus_anharmonic", "-V"], capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[-1] == __version__
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))
    assert "_magus_anharmonic_completion" in run("--show-completion")[1]
