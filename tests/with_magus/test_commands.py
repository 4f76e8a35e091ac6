"""The other commands of MAGUS with our calculator: generate, calculate, -p, -m -r, and their
refusals."""

import subprocess

import numpy as np
import pytest
from ase.io import read
from magus_run import LEARNING, TIMEOUT, command, magus, needs_magus, ours, write_input

from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.units import gpa_to_ev_per_a3

pytestmark = needs_magus

STATIC = {"Fitness": ["Enthalpy"], "numGen": 1}


def static_input(folder, **changes):
    write_input(folder, **{**STATIC, **changes})
    text = (folder / "input.yaml").read_text()
    lines, skipping = [], False
    for line in text.splitlines():
        skipping = line.startswith("sscha:") or (skipping and line.startswith(" "))
        if not skipping:
            lines.append(line)
    (folder / "input.yaml").write_text("\n".join(lines) + "\n")


def test_generated_structures_are_relaxed_and_evaluated_at_the_pressure(work, tiny_checkpoint):
    static_input(work, MainCalculator=ours(max_step=3))
    result = magus(work, "generate", "-n", "3", "-o", "gen.traj")
    assert result.returncode == 0, result.stdout[-2000:]
    assert len(read(work / "gen.traj", ":")) == 3
    for mode in ("relax", "scf"):
        result = magus(work, "calculate", "gen.traj", "-m", mode, "-p", "20", "-o", f"{mode}.traj")
        assert result.returncode == 0, result.stdout[-2000:]
    from magus_anharmonic.potential import load

    potential = load(tiny_checkpoint, device="cpu")
    for atoms in [*read(work / "scf.traj", ":"), *read(work / "relax.traj", ":")]:
        energy = potential.evaluate([atoms]).energy[0]
        assert atoms.info["energy"] == pytest.approx(energy, abs=1e-4)
        expected = (energy + gpa_to_ev_per_a3(20.0) * atoms.get_volume()) / len(atoms)
        assert atoms.info["enthalpy"] == pytest.approx(expected, abs=1e-4)
    assert len(read(work / "relax.traj", ":")) == 3


def test_parallel_mode_works_on_the_cpu_where_magus_s_own_calculators_cannot(work):
    """The fault: every ASECalculator of MAGUS 2.0.1 holds a class made inside its constructor,
    which does not pickle."""
    static_input(
        work,
        MainCalculator={"calculator": "emt", "jobPrefix": "EMT"},
        num_para_generator=2,
        num_para_calc=2,
    )
    stock = magus(work, "search", "-p")
    assert stock.returncode != 0 and "MagusOptimizer" in stock.stdout, (
        "if MAGUS has mended it, docs/magus.md can say so"
    )
    static_input(work, MainCalculator=ours(device="cpu"), num_para_generator=2, num_para_calc=2)
    result = magus(work, "search", "-p")
    assert result.returncode == 0, result.stdout[-3000:]
    good = read(work / "results/good.traj", ":")
    assert good and np.isfinite([atoms.info["enthalpy"] for atoms in good]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"MainCalculator": ours(device="cuda")},
            "MainCalculator.device: cuda cannot be used by the forked workers",
        ),
        (
            {"MainCalculator": ours(device="cpu"), "scheduler": "tcp://127.0.0.1:8786"},
            "scheduler: tcp://127.0.0.1:8786 does not go with",
        ),
    ],
)
def test_parallel_mode_is_refused_with_a_gpu_and_with_workers_elsewhere(work, changes, words):
    static_input(work, **changes)
    result = magus(work, "search", "-p")
    assert result.returncode == 2 and words in result.stdout and "Traceback" not in result.stdout, (
        result.stdout[-2000:]
    )
    assert not (work / "results").exists()


def test_a_restart_of_the_ml_mode_labels_and_trains_nothing_again(work):
    """The faults: MLMagus repeats its initial training on a restart unless ``init_times`` is 0, as
    ours is, and every MAGUS repeats its last round and puts its best structure into best.traj
    again.

    With the model and the volume ratio that it began with, the repeated round finds what it found;
    its labels are there already.
    """
    learning = {**LEARNING, "labeler": {"calculator": "main"}}
    main = {"calculator": "emt", "jobPrefix": "EMT"}
    static_input(
        work,
        MainCalculator=main,
        MLCalculator=ours("ML"),
        SelectDFTScf=True,
        learning=learning,
        numGen=2,
    )
    first = magus(work, "search", "-m")
    assert first.returncode == 0, first.stdout[-3000:]
    before, found = learned(work), populations(work)
    again = magus(work, "search", "-m", "-r")
    assert again.returncode == 0, again.stdout[-3000:]
    assert learned(work) == before and not list(
        (work / "results/anharmonic/labels/pending").glob("*")
    )
    repeated = populations(work)
    best = found.pop("best.traj")
    assert repeated.pop("best.traj") == [*best, best[-1]], "MAGUS counts the repeated round twice"
    assert repeated == found


UNWRAPPED = """
from magus.entrypoints.main import main
from magus.search.search import Magus
from magus_anharmonic import plugins
plugins.register()
Magus.{method} = Magus.{method}.__wrapped__
Magus.{method}.by_magus_anharmonic = True
main()
"""
"""MAGUS with our calculator, and with one of its own methods back in the place of ours."""

STOCK = UNWRAPPED.format(method="update_volume_ratio")
"""MAGUS with our calculator, and with its own update of the volume ratio."""


def test_a_restarted_round_keeps_the_volume_ratio_that_it_began_with(work):
    """The fault: MAGUS reads the ratio that a round began with from its log and updates it as if it
    were that of the round before."""
    static_input(work, MainCalculator=ours(max_step=1), numGen=2)
    assert magus(work, "search").returncode == 0
    (first,) = volume_ratios(work)
    assert magus(work, "search", "-r").returncode == 0
    assert volume_ratios(work) == [first, first], "the second is what the restart read"
    call, options = command(work, "search", "-r")
    assert (
        subprocess.run([call[0], "-c", STOCK, *call[-2:]], timeout=TIMEOUT, **options).returncode
        == 0
    )
    *_, read_again, updated = volume_ratios(work)
    assert read_again == first != updated, (
        "if MAGUS has mended it, hook.py need not leave the update out"
    )


def volume_ratios(folder):
    return [
        float(line.split()[-1])
        for line in (folder / "log.txt").read_text().splitlines()
        if "volRatio" in line
    ]


def learned(folder):
    """Labels, what says which they are, models and their errors."""
    ours = folder / "results/anharmonic"
    files = [*ours.glob("labels/*"), *ours.glob("checkpoints/*"), ours / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def populations(folder):
    """Identity, space group and enthalpy (to 0.1 meV/atom: survivors are relaxed together with
    others the second time)."""
    names = [
        "best.traj",
        *(f"{kind}{g}.traj" for kind in ("init", "mlraw", "gen", "good") for g in (1, 2)),
    ]
    frames = {name: read(folder / "results" / name, ":") for name in names}
    return {
        name: sorted(
            (
                str(a.info["identity"]),
                int(a.info.get("spg", 0)),
                round(float(a.info.get("enthalpy", 0.0)), 4),
            )
            for a in found
        )
        for name, found in frames.items()
    }


def test_missing_free_energies_are_last_in_the_summary(work):
    from ase.build import bulk
    from ase.io import write

    frames = [bulk("Al", a=a) for a in (4.0, 4.1, 4.2)]
    for atoms, value in zip(frames, (-1.0, None, -2.0), strict=True):
        atoms.info.update(enthalpy=0.0, status="sscha" if value else "static")
        if value is not None:
            atoms.info["gibbs"] = value
    write(work / "some.traj", frames)
    result = magus(work, "summary", "some.traj", "-a", "gibbs", "-sb", "gibbs")
    shown = [
        float(line.split()[-1])
        for line in result.stdout.splitlines()
        if line.split()[:1] in (["1"], ["2"], ["3"])
    ]
    assert shown[:2] == [-2.0, -1.0] and np.isnan(shown[2]), result.stdout


def test_a_log_line_with_magus_s_words_breaks_its_restart(work):
    """The fault: a restart takes the last line of log.txt that holds a word. Ours never do
    (tests/test_architecture.py)."""
    static_input(work, MainCalculator=ours(max_step=1), numGen=2)
    assert magus(work, "search").returncode == 0
    with (work / "log.txt").open("a") as file:
        file.write("a plug-in: volRatio of the sample is fine\n")
    result = magus(work, "search", "-r")
    assert result.returncode != 0 and "could not convert string to float" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-ll", "INFO"], "cannot go on within its first round"),
        (["-ll", "WARNING"], "names no round to go on with"),
    ],
)
def test_a_restart_that_magus_cannot_make_is_refused_in_one_line(work, options, words):
    """The fault: MAGUS looks for its place in the log, which does not have it before the second
    round, nor with few messages."""
    static_input(work, MainCalculator={"calculator": "emt", "jobPrefix": "EMT"})
    assert magus(work, "search", *options).returncode == 0
    stock = magus(work, "search", "-r")
    assert stock.returncode != 0 and "IndexError" in stock.stdout, stock.stdout[-2000:]
    static_input(work, MainCalculator=ours(max_step=1))
    result = magus(work, "search", "-r")
    assert result.returncode == 2 and words in result.stdout and "Traceback" not in result.stdout, (
        result.stdout[-2000:]
    )


WITHOUT_HOOK = UNWRAPPED.format(method="set_good_pop")
"""MAGUS with our calculator, and nothing of ours between its rounds."""


def test_energies_of_several_models_are_compared_there_and_of_the_newest_here(work):
    """The fault: MAGUS relaxes before it trains, and keeps the enthalpies of survivors for ever."""
    learning = {**LEARNING, "labeler": {"calculator": "main"}}
    main = {"calculator": "emt", "jobPrefix": "EMT"}
    static_input(
        work, MainCalculator=main, MLCalculator=ours("ML"), SelectDFTScf=True, learning=learning
    )
    call, options = command(work, "search", "-m")
    assert (
        subprocess.run(
            [call[0], "-c", WITHOUT_HOOK, *call[-2:]], timeout=TIMEOUT, **options
        ).returncode
        == 0
    )
    assert newest_model(work) not in models(work)
    assert magus(work, "search", "-m").returncode == 0
    assert models(work) == {newest_model(work)}


def models(folder):
    return {atoms.info["model"] for atoms in read(folder / "results/good.traj", ":")}


def newest_model(folder):
    return read_jsonl(folder / "results/anharmonic/metrics.jsonl")[-1]["new_model"]
