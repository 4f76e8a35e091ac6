"""Commands of labelers: a program, its arguments and plain redirections, and never a shell, whoever
asks for one."""

import os
import subprocess
import sys

import pytest
from ase.build import bulk

from magus_anharmonic.errors import InputError, LabelerError
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.base import Command, no_shell, read_command
from magus_anharmonic.settings import LabelerSettings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vasp_std", Command(("vasp_std",))),
        (
            "mpirun -n 4 --map-by 'a; b' vasp\n",
            Command(("mpirun", "-n", "4", "--map-by", "a; b", "vasp")),
        ),
        (r"""run "it's" a\ b 'c "$d"' ''""", Command(("run", "it's", "a b", 'c "$d"', ""))),
        ("srun -w n[1-4] --x={1,2} vasp", Command(("srun", "-w", "n[1-4]", "--x={1,2}", "vasp"))),
        (
            "nwchem PREFIX.nwi > PREFIX.nwo",
            Command(("nwchem", "PREFIX.nwi"), stdout=("PREFIX.nwo", "wb")),
        ),
        (
            "gulp < PREFIX.gin > PREFIX.got",
            Command(("gulp",), stdin=("PREFIX.gin", "rb"), stdout=("PREFIX.got", "wb")),
        ),
        (
            "rungms a >>log 2> 'my err'",
            Command(("rungms", "a"), stdout=("log", "ab"), stderr=("my err", "wb")),
        ),
        ("vasp>log 2>&1", Command(("vasp",), stdout=("log", "wb"), joined=True)),
        ("code -n 2 > log2", Command(("code", "-n", "2"), stdout=("log2", "wb"))),
        ("run a2>log", Command(("run", "a2"), stdout=("log", "wb"))),
    ],
)
def test_a_command_is_split_as_a_shell_splits_it(text, expected):
    assert read_command(text) == expected


@pytest.mark.parametrize("text", [
    "a; b", "a && b", "a || b", "a & ", "a | b", "a `b`", "a $(b)", "a $", "a ${b:-c}", "a $1", 'a "$(b)"', 'a "`b`"', "a\nb", "(a)",
    "a *.x", "a ?", "~/a", "a #b", "a << E", "a <> b", "a &> f", "a >& f", "a >&2", "a >| f", "a 2>&12",
])  # fmt: skip
def test_what_only_a_shell_understands_is_refused(text):
    with pytest.raises(
        LabelerError,
        match=(
            r"only a shell understands .*allowed: a program, its arguments, quotes, \$NAME and the"
            r" redirections"
        ),
    ):
        read_command(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mpirun -np $N vasp", ("mpirun", "-np", "4", "vasp")),
        ("mpirun -np ${N}0 $CODE", ("mpirun", "-np", "40", "a b; c")),
        ("""run "$N $CODE" '$N' \\$N""", ("run", "4 a b; c", "$N", "$N")),
    ],
)
def test_a_variable_is_one_word_whatever_it_holds(text, expected):
    assert read_command(text, {"N": "4", "CODE": "a b; c"}).words == expected
    assert read_command("run $N").words == ("run", "$N"), (
        "kept until the command starts, where its value is known"
    )


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(LabelerError, match="the variable NTASKS of its command is not set"):
        read_command("mpirun -np $NTASKS vasp", {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must name a program"),
        ("  ", "must name a program"),
        ("''", "must name a program"),
        ("> log", "must name a program"),
        (5, "must be text"),
        (["mpirun", "vasp"], "must be text"),
        ("vasp 'x", "has no end"),
        ("vasp \\", "has no end"),
        ("vasp >", "a file name is missing"),
        ("vasp > > log", "a file name is missing"),
        ("vasp > a > b", "redirected already"),
        ("vasp 2>&1 > log", "2>&1 at the end"),
        ("OMP_NUM_THREADS=1 vasp", "env OMP_NUM_THREADS=1 ..."),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_in_one_line(text, words):
    with pytest.raises(LabelerError) as caught:
        read_command(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


PROGRAM = (
    "import sys; print(sys.argv[1:]); print('error', file=sys.stderr); print(sys.stdin.read() if"
    " 'in' in sys.argv else '')"
)


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return f"{sys.executable} {tmp_path / 'program.py'}"


@pytest.mark.parametrize(
    "rest",
    ["a 'b c' > out 2>&1", "in < given > out 2> err", "x >> out", "x 2> err > out", "x 1>out"],
)
def test_what_asks_for_a_shell_is_started_without_one_and_writes_what_a_shell_would(
    tmp_path, program, rest
):
    written = []
    for name in ("shell", "here"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "given").write_text("read")
        (folder / "out").write_text("before\n")
        if name == "shell":
            subprocess.check_call(
                f"{program} {rest}", shell=True, cwd=folder, stderr=subprocess.DEVNULL
            )
        else:
            with no_shell():
                subprocess.check_call(
                    f"{program} {rest}", shell=True, cwd=folder, stderr=subprocess.DEVNULL
                )
        written.append({file.name: file.read_text() for file in sorted(folder.iterdir())})
    assert written[0] == written[1]


def test_who_reads_a_pipe_gets_what_is_not_redirected(tmp_path, program):
    with no_shell():
        plain = subprocess.run(
            f"{program} x", shell=True, capture_output=True, text=True, check=True
        )
        hidden = subprocess.run(
            f"{program} x > {tmp_path / 'out'} 2>&1",
            shell=True,
            capture_output=True,
            text=True,
            check=True,
        )
        assert os.popen(f"{program} y 2> /dev/null").read() == "['y']\n\n"
        assert (
            os.system(f"{program} z > {tmp_path / 'z'} 2>&1") == 0
            and "['z']" in (tmp_path / "z").read_text()
        )
    assert (plain.stdout, plain.stderr) == ("['x']\n\n", "error\n") and (
        hidden.stdout,
        hidden.stderr,
    ) == ("", "")


@pytest.mark.parametrize("start", ["os.system", "os.popen", "subprocess.getoutput"])
def test_nothing_of_a_command_that_needs_a_shell_is_carried_out(tmp_path, start):
    module, _, function = start.partition(".")
    with no_shell(), pytest.raises(LabelerError, match="only a shell"):
        getattr({"os": os, "subprocess": subprocess}[module], function)(
            f"touch {tmp_path / 'marker'}; false"
        )
    assert not (tmp_path / "marker").exists()


def test_outside_of_a_label_everything_is_as_before():
    before = (subprocess.Popen.__init__, os.system)
    with pytest.raises(RuntimeError), no_shell():
        raise RuntimeError
    assert (subprocess.Popen.__init__, os.system) == before
    assert subprocess.check_output("echo a; echo b", shell=True) == b"a\nb\n"


# -------------------------------------------------- ASE's calculators that start a shell themselves

COMMANDS = {
    "ase.calculators.nwchem.NWChem": "ASE_NWCHEM_COMMAND",
    "ase.calculators.cp2k.CP2K": "ASE_CP2K_COMMAND",
    "ase.calculators.vasp.Vasp": "ASE_VASP_COMMAND",
    "ase.calculators.gulp.GULP": "ASE_GULP_COMMAND",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if i % 2 == 0 else pytest.mark.full)
        for i, name in enumerate(COMMANDS)
    ],
)
def test_a_calculator_by_import_path_starts_no_shell(tmp_path, name, monkeypatch):
    marker = tmp_path / "marker"
    with pytest.raises(
        InputError, match=r"learning\.labeler\.arguments\.command: .*only a shell understands"
    ):
        get_labeler(
            LabelerSettings(calculator=name, arguments={"command": f"touch {marker}; false"}),
            tmp_path / "scratch",
        )
    assert not (tmp_path / "scratch").exists()
    potcar = tmp_path / "potpaw/Si/POTCAR"
    potcar.parent.mkdir(parents=True)
    potcar.write_text("  PAW Si 15Jun2001\n   1.0\n parameters from PSCTR are:\n End of Dataset\n")
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("VASP_PP_PATH", str(tmp_path))
    monkeypatch.setenv("GULP_LIB", "none")
    # ase 3.23 starts CP2K by commands alone in which this name is
    monkeypatch.setenv(COMMANDS[name], f"touch {marker}; false cp2k_shell")
    with get_labeler(
        LabelerSettings(calculator=name, n_workers=1), tmp_path / "scratch"
    ) as labeler:
        (result,) = labeler.label([bulk("Si")])
    assert not result.ok and "only a shell understands" in result.reason, result.reason
    assert not marker.exists() and not list((tmp_path / "project").iterdir()), (
        "its files are in the folder of the label"
    )


def test_the_redirections_of_ases_own_commands_work_without_a_shell(tmp_path):
    (tmp_path / "code.py").write_text(
        "import sys; print(sys.argv[1:]); print(open(sys.argv[1]).read()[:5])"
    )
    command = (
        f"env OMP_NUM_THREADS=1 {sys.executable} {tmp_path / 'code.py'} PREFIX.nwi 'a b' >"
        " PREFIX.nwo 2> /dev/null"
    )
    settings = LabelerSettings(
        calculator="ase.calculators.nwchem.NWChem", arguments={"command": command}, n_workers=1
    )
    with get_labeler(settings, tmp_path / "scratch") as labeler:
        (result,) = labeler.label([bulk("Si")])
    assert not result.ok, "the program writes no energy"
    kept = next((tmp_path / "scratch" / "failed").iterdir())
    assert (kept / "nwchem.nwo").read_text().splitlines()[0] == "['nwchem.nwi', 'a b']"


def test_a_missing_program_is_the_reason(tmp_path):
    settings = LabelerSettings(
        calculator="ase.calculators.nwchem.NWChem",
        arguments={"command": "no-such-code > log"},
        n_workers=1,
    )
    with get_labeler(settings, tmp_path / "scratch") as labeler:
        (result,) = labeler.label([bulk("Si")])
    assert not result.ok and "no-such-code" in result.reason
