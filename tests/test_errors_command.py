"""``magus-anharmonic errors``: labels that are kept, failures that are recorded, tables and figures
that follow."""

import json

import numpy as np
import pytest
from harmonic_pair import pair

from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.labelers import Failure, Label
from magus_anharmonic.learning.dataset import read_labels
from magus_anharmonic.paper import tables
from magus_anharmonic.paper.ensemble_errors import (
    Source,
    add_to_tables,
    draw_report,
    find_source,
    given_displacements,
    load_labeler_settings,
    measure_errors,
)
from magus_anharmonic.paper.ensemble_labels import sample_displacements
from magus_anharmonic.runs.record import read_failures
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.result import RunFolder


class Reference:
    """A labeler with a `HarmonicCrystal` as DFT code, whose labels are told one by one; counts, and
    fails or stops where it is told to."""

    description = "harmonic crystal"

    def __init__(self, crystal, settings="ref", fail_at=(), stop_at=None):
        self.crystal, self.settings_hash, self.fail_at, self.stop_at, self.count = (
            crystal,
            settings,
            fail_at,
            stop_at,
            0,
        )

    def label(self, structures, on_result):
        for index, atoms in enumerate(structures):
            number, self.count = self.count, self.count + 1
            if number == self.stop_at:
                raise KeyboardInterrupt
            if number in self.fail_at:
                on_result(index, Failure(atoms, "the density did not converge", self.settings_hash))
                continue
            found = self.crystal.evaluate([atoms])
            on_result(
                index,
                Label(
                    atoms,
                    float(found.energy[0]),
                    None,
                    found.forces[0],
                    np.zeros((3, 3)),
                    self.settings_hash,
                    0.0,
                ),
            )


def run(folder, *, fail_at=(), stop_at=None, n=12, settings="ref"):
    model, reference = pair(0.2)
    labeler = Reference(reference, settings, fail_at, stop_at)
    source = Source(model.state, "P1", 50.0, "harmonic-crystal", model.free_energy / 3, 0.001)
    report = measure_errors(source, model, labeler, folder, n_configs=n)
    return report, labeler


def test_everything_is_written_and_the_numbers_agree(tmp_path):
    report, labeler = run(tmp_path)
    assert labeler.count == 13
    rows = {
        row.quantity: row
        for row in tables.read(tables.GradientError, tmp_path / "gradient_errors.csv")
    }
    assert set(rows) == set(tables.GRADIENT_UNITS)
    assert rows["gradient_centroid"].rmse == pytest.approx(report.errors.centroid.mean, rel=1e-8)
    assert rows["gradient_centroid"].floor == pytest.approx(
        rows["force"].rmse / np.sqrt(12), rel=1e-8
    )
    (line,) = tables.read(tables.GibbsCorrection, tmp_path / "gibbs_correction.csv")
    assert (line.phase, line.pressure_GPa, line.n_labels) == ("P1", 50.0, 12)
    value, error = report.corrected_gibbs
    both = line.correction_eV_per_atom + line.second_order_eV_per_atom
    assert value == pytest.approx(report.source.gibbs + both, rel=1e-8)
    assert error == pytest.approx(np.hypot(0.001, report.correction.error), rel=1e-6)
    assert json.loads((tmp_path / "errors.json").read_text())["n_failed"] == 0
    draw_report(report)
    assert (tmp_path / "gradient_errors.png").stat().st_size > 10_000 and (
        tmp_path / "gradient_errors.svg"
    ).is_file()


def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(tmp_path):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=5)
    resumed, labeler = run(tmp_path / "cut")
    assert labeler.count == 13 - 5
    assert resumed.errors == whole.errors and resumed.correction == whole.correction


def test_a_second_process_in_the_folder_is_refused_and_no_label_of_the_first_is_lost(tmp_path):
    model, reference = pair(0.2)
    source = Source(model.state, "P1", 50.0)
    second = Reference(reference)

    class First(Reference):
        def label(self, structures, on_result):
            def meanwhile(index, result):
                if index == 3:
                    with pytest.raises(
                        InputError, match="another process works here: magus-anharmonic errors"
                    ):
                        measure_errors(source, model, second, tmp_path, n_configs=8)
                on_result(index, result)

            return super().label(structures, meanwhile)

    measure_errors(source, model, First(reference), tmp_path, n_configs=8)
    assert len(read_labels(tmp_path / "labels.xyz")) == 9 and not (tmp_path / "lock.json").exists()


def test_a_cut_source_file_is_made_anew_beside_labels_of_the_same_settings_and_of_no_others(
    tmp_path,
):
    whole, _ = run(tmp_path)
    source = tmp_path / "source.json"
    content = source.read_bytes()
    source.write_bytes(content[:40])
    again, labeler = run(tmp_path)
    assert again.errors == whole.errors and labeler.count == 0
    assert source.read_bytes() == content and (tmp_path / "source.json.damaged").is_file()
    source.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"labels\.xyz: holds labels of other DFT settings \(ref, now other\)"
    ):
        run(tmp_path, settings="other")


def test_a_label_that_fails_again_is_recorded_once_and_as_a_label(tmp_path):
    for _ in range(3):
        run(tmp_path, fail_at=(0,))
    (record,) = read_failures(tmp_path)
    assert (
        record["stage"] == "label"
        and record["number"] == -1
        and "the density did not converge" in record["reason"]
    )


def test_more_configurations_keep_the_labels_of_fewer(tmp_path):
    run(tmp_path, n=8)
    report, labeler = run(tmp_path, n=12)
    assert labeler.count == 4 and report.errors.n_configs == 12


def test_no_more_labels_are_made_than_the_wanted_error_takes(tmp_path):
    model, reference = pair(0.2)
    source = Source(model.state, "P1", 50.0, "harmonic-crystal")
    found = {}
    for wanted in (1.0, 2.8e-4, 1e-9):
        labeler, folder = Reference(reference), tmp_path / str(wanted)
        report = measure_errors(source, model, labeler, folder, n_configs=60, wanted=wanted)
        found[wanted] = labeler.count - 1, report.correction.error
    assert found[1.0][0] == 20 and found[1e-9][0] == 60, found
    assert 20 < found[2.8e-4][0] < 60 and found[2.8e-4][1] <= 2.8e-4, found


def test_a_failed_label_is_recorded_and_its_pair_left_out(tmp_path):
    report, _ = run(tmp_path, fail_at=(4,))
    assert report.n_failed == 1 and report.errors.n_configs == 10
    (failure,) = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert "density did not converge" in failure and '"number": 3' in failure
    again, labeler = run(tmp_path)
    assert labeler.count == 1 and again.n_failed == 0 and again.errors.n_configs == 12


def test_two_pairs_have_no_error_of_the_systematic_part_and_the_files_say_so(tmp_path):
    run(tmp_path, n=4)
    text = (tmp_path / "errors.json").read_text()
    assert (
        "Infinity" not in text
        and json.loads(text)["errors"]["centroid"]["systematic_error"] is None
    )
    rows = tables.read(tables.GradientError, tmp_path / "gradient_errors.csv")
    assert all(row.systematic_error is None for row in rows)


def test_too_few_whole_pairs_are_a_clear_error(tmp_path):
    with pytest.raises(
        MagusAnharmonicError,
        match="1 whole pairs.*1 of 4 labels failed.*the density did not converge",
    ):
        run(tmp_path, n=4, fail_at=(2,))


def test_when_every_label_fails_the_reason_is_theirs(tmp_path):
    with pytest.raises(
        MagusAnharmonicError,
        match="0 whole pairs.*4 of 4 labels failed, 4 of them so: .*the density did not converge",
    ) as caught:
        run(tmp_path, n=4, fail_at=(0, 1, 2, 3, 4))
    assert not isinstance(caught.value, InputError), "nothing is wrong with the input"


def test_labels_of_other_settings_or_of_another_state_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match="other DFT settings"):
        run(tmp_path, settings="finer")
    model, reference = pair(0.2, supercell_matrix=(1, 1, 2))
    with pytest.raises(InputError, match="another SSCHA state"):
        measure_errors(
            Source(model.state, "P1", 50.0), model, Reference(reference), tmp_path, n_configs=8
        )


def test_results_join_the_tables_of_a_campaign_in_place_of_earlier_ones(tmp_path):
    report, _ = run(tmp_path / "errors")
    other = tables.GibbsCorrection("Cccm", 50.0, 10, 0.001, None, None)
    earlier = tables.GibbsCorrection("P1", 50.0, 4, 9.9, None, None)
    tables.write(
        tables.GibbsCorrection, tmp_path / "tables" / "gibbs_correction.csv", [other, earlier]
    )
    add_to_tables(report, tmp_path / "tables")
    found = tables.read(tables.GibbsCorrection, tmp_path / "tables" / "gibbs_correction.csv")
    assert [row.phase for row in found] == ["Cccm", "P1"] and found[1].n_labels == 12
    assert len(tables.read(tables.GradientError, tmp_path / "tables" / "gradient_errors.csv")) == 4


def test_the_configurations_of_a_population_can_be_taken(tmp_path):
    model, _ = pair(0.2)
    u = sample_displacements(model.state, 8, seed=5)
    folder = RunFolder(tmp_path, {})
    folder._write(
        "population_001.npz",
        model.state,
        displacements=u,
        energies=np.zeros(8),
        forces=u,
        stresses=np.zeros((8, 3, 3)),
    )
    assert given_displacements(model.state, tmp_path / "population_001.npz") == pytest.approx(
        u, abs=1e-12
    )
    folder._write(
        "population_002.npz",
        model.state,
        displacements=u[1:7],
        energies=np.zeros(6),
        forces=u[1:7],
        stresses=np.zeros((6, 3, 3)),
    )
    with pytest.raises(InputError, match="not pairs"):
        given_displacements(model.state, tmp_path / "population_002.npz")
    assert Ensemble(u, np.zeros(8), u, np.zeros((8, 3, 3))).displacements is u


def test_wrong_sources_and_settings_are_named(tmp_path):
    model, _ = pair(0.2)
    nothing = parse_settings({})
    with pytest.raises(InputError, match="no such structure file"):
        find_source(tmp_path / "nothing", model, tmp_path, nothing, run=None)
    (tmp_path / "x.cif").write_text("not a crystal")
    with pytest.raises(InputError, match="--pressure"):
        find_source(tmp_path / "x.cif", model, tmp_path, nothing, run=None)
    with pytest.raises(InputError, match="not readable as structures by ASE"):
        given = parse_settings({"pressure": 10.0})
        find_source(tmp_path / "x.cif", model, tmp_path, given, run=None)
    with pytest.raises(InputError, match="result.json"):
        find_source(tmp_path, model, tmp_path, nothing, run=None)
    (tmp_path / "ref.yaml").write_text("kpts: 3\n")
    with pytest.raises(InputError, match="names no labeler"):
        load_labeler_settings(tmp_path / "ref.yaml")
    (tmp_path / "ref.yaml").write_text("labeler: {calculator: gpaw, k_spacing: 0.05}\n")
    assert load_labeler_settings(tmp_path / "ref.yaml").k_spacing == 0.05
    with pytest.raises(InputError, match="must be even"):
        sample_displacements(model.state, 7, 0)


def finished_run(folder):
    """The folder of an SSCHA run of four atoms of H3S that ended in stiff isotropic springs."""
    from dataclasses import fields

    from ase import Atoms

    from magus_anharmonic.sscha.result import SschaResult
    from magus_anharmonic.sscha.symmetry import Symmetry

    a = 3.1
    atoms = Atoms(
        "SH3",
        cell=[[-a / 2, a / 2, a / 2], [a / 2, -a / 2, a / 2], [a / 2, a / 2, -a / 2]],
        pbc=True,
    )
    atoms.set_scaled_positions([(0, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)])
    springs = 20.0 * np.einsum("ab,ij->abij", np.eye(4), np.eye(3))[None]
    values = {field.name: 0.0 for field in fields(SschaResult)} | {
        "status": "converged",
        "reason": "",
        "error_vector": None,
        "model_id": "m",
        "supercell": (1, 1, 1),
        "space_group": "Im-3m (229)",
        "space_group_start": "Im-3m (229)",
        "stress": np.zeros((3, 3)),
        "stress_error": np.zeros((3, 3)),
        "target_pressure": 150.0,
        "centroids": atoms,
        "force_constants": Symmetry(atoms, (1, 1, 1)).force_constants(springs),
    }
    folder.mkdir(parents=True)
    SschaResult(**values).write(folder)
    return folder


def command(*arguments):
    from typer.testing import CliRunner

    from magus_anharmonic.cli import app

    return CliRunner().invoke(app, ["errors", *arguments])


@pytest.mark.slow
def test_the_command_compares_the_shipped_model_with_any_ase_calculator(tmp_path):
    reference = tmp_path / "ref.yaml"
    reference.write_text(
        "labeler: {calculator: ase.calculators.lj.LennardJones, arguments: {sigma: 1.1, epsilon:"
        " 0.05}, n_workers: 1}\n"
    )
    run_folder = finished_run(tmp_path / "run")
    options = [
        "-r",
        str(reference),
        "--checkpoint",
        "h3s-gpaw-small",
        "-n",
        "6",
        "-o",
        str(tmp_path / "out"),
    ]
    found = command(str(run_folder), *options, "--tables", str(tmp_path / "tables"))
    assert found.exit_code == 0, found.output
    assert "Im-3m at 150 GPa" in found.output and "first order" in found.output
    assert (tmp_path / "out" / "gradient_errors.svg").is_file()
    (line,) = tables.read(tables.GibbsCorrection, tmp_path / "tables" / "gibbs_correction.csv")
    assert (line.phase, line.n_labels) == ("Im-3m", 6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["run", "-r", "missing.yaml", "--checkpoint", "h3s-gpaw-small"],
            "missing.yaml: no such file",
        ),
        (["run", "-r", "ref.yaml", "--checkpoint", "h3s-gpaw-small", "-n", "7"], "must be even"),
        (["run", "-r", "wrong.yaml", "--checkpoint", "h3s-gpaw-small"], "labeler.kspacing"),
        (
            ["nowhere", "-r", "ref.yaml", "--checkpoint", "h3s-gpaw-small"],
            "nowhere: no such structure file",
        ),
    ],
)
def test_bad_input_is_named_and_ends_with_code_2(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "run")
    (tmp_path / "ref.yaml").write_text("labeler: {calculator: ase.calculators.lj.LennardJones}\n")
    (tmp_path / "wrong.yaml").write_text("labeler: {calculator: gpaw, kspacing: 0.1}\n")
    found = command(*arguments)
    assert found.exit_code == 2 and words in found.output
