"""A campaign: what its file may say, which steps there are, and that they are skipped, resumed,
repeated and reported."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from campaign_inputs import changed, write_campaign
from campaign_tables import read_rows
from typer.testing import CliRunner

from magus_anharmonic.campaign import run as driver
from magus_anharmonic.campaign.run import status
from magus_anharmonic.campaign.steps import (
    Context,
    Outcome,
    StepRecord,
    plan,
    read_records,
    step_key,
    write_part,
    write_records,
)
from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.io.files import write_json
from magus_anharmonic.paper import script
from magus_anharmonic.paper.tables import LearningPoint
from magus_anharmonic.report.contents import campaign_contents
from magus_anharmonic.runs import status as folder_status
from magus_anharmonic.runs.lock import locked
from magus_anharmonic.settings import parse
from magus_anharmonic.settings.campaign import CampaignSettings, load_campaign


class Fakes:
    """Stand-ins for all runners: they count calls, leave a part of a table, and do what ``acts``
    says for a step."""

    def __init__(self):
        self.calls: list[str] = []
        self.acts: dict[str, Any] = {}
        self.rmse: list[float] = [0.005]

    def __call__(self, context, step):
        self.calls.append(step.id)
        folder = context.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        if step.id in self.acts:
            self.acts[step.id]()
        if step.kind == "final":
            errors = {
                "finetuned": {
                    "validation": {"energy_rmse": self.rmse[min(step.cycle, len(self.rmse)) - 1]}
                }
            }
            (folder / f"errors-cycle{step.cycle}.json").write_text(json.dumps(errors))
        point = LearningPoint(step.id, step.cycle, "model", "training", 0.1, 0.2, 0.3, 4)
        write_part(folder, LearningPoint, [point])
        return Outcome(n_structures=2, n_evaluations=10, n_labels=3, output=f"result of {step.id}")


@pytest.fixture
def fakes(monkeypatch):
    found = Fakes()
    monkeypatch.setattr(driver, "runners", lambda: dict.fromkeys(driver.WHAT, found))
    monkeypatch.setattr(Context, "foundation", SimpleNamespace(model_id="0123456789ab"))
    return found


IDS = [
    "learn-075GPa",
    "learn-125GPa",
    "merge",
    "final",
    "produce-050GPa",
    "produce-100GPa",
    "relax",
    "sscha-100GPa",
    "dft",
    "hessian",
    "report",
]


def test_the_steps_of_a_campaign_are_those_of_figure_1b(tmp_path):
    steps = {step.id: step for step in plan(load_campaign(write_campaign(tmp_path)))}
    assert list(steps) == IDS
    assert steps["merge"].needs == ("learn-075GPa", "learn-125GPa")
    assert steps["produce-050GPa"].needs == ("final",)
    assert "produce-100GPa" in steps["sscha-100GPa"].needs
    assert steps["dft"].needs == ("sscha-100GPa",)


def test_without_learning_the_foundation_is_the_model(tmp_path):
    steps = {
        step.id: step
        for step in plan(
            load_campaign(write_campaign(tmp_path, learning=None, dft=None, labeler=None))
        )
    }
    assert "final" not in steps and steps["produce-050GPa"].needs == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hessian": {"phases": [{"name": "R3m"}]}},
            ["hessian.phases: 'R3m' is not defined under phases", "Im-3m"],
        ),
        (
            {"figures": {"reference_phase": "Fm-3m"}},
            ["figures.reference_phase: 'Fm-3m' is not defined"],
        ),
        (
            {"produce": {"pressures": [100, 50]}},
            ["produce.pressures", "out of order", "50 comes after 100"],
        ),
        ({"learning": {"pressures": [75, 75]}}, ["learning.pressures", "out of order"]),
        ({"hessian": {"dispersions": [120]}}, ["120 GPa is not one of hessian.pressures"]),
        (
            {"produce": {"presures": [50]}},
            ["produce.presures: unknown key", "did you mean pressures"],
        ),
        (
            {"learning": {"settings": {"n_samples": 3}}},
            ["learning.settings.n_samples: unknown key", "n_sample"],
        ),
        (
            {"sscha": {"settings": {"n_config": 10}}},
            ["sscha.settings.n_config: unknown key", "n_configs"],
        ),
        (
            {"sscha": {"settings": {"evaluator": "emt"}}},
            ["sscha.settings.evaluator: a campaign ranks by its final model"],
        ),
        ({"search": {"pressure": 10}}, ["search.pressure: is set by the campaign"]),
        ({"labeler": None}, ["learning: needs the block labeler"]),
        ({"produce": None}, ["relax: needs the block produce"]),
        ({"learning": {"max_cycles": 3}}, ["max_cycles above 1 needs target_rmse"]),
        ({"relax": {"pressures": [1.5e11]}}, ["looks like Pa"]),
        ({"phases": [{"name": "Im-3m"}]}, ["give structure (a file) or space_group"]),
    ],
)
def test_wrong_input_is_one_message_that_names_the_key(changes, words):
    with pytest.raises(InputError) as caught:
        parse(CampaignSettings, changed(**changes))
    for word in words:
        assert word in str(caught.value)


def test_wrong_input_ends_the_command_with_2_and_no_traceback(tmp_path):
    file = write_campaign(tmp_path, hessian={"phases": [{"name": "R3m"}]})
    result = CliRunner().invoke(app, ["campaign", str(file)])
    assert result.exit_code == 2
    assert (
        "input error: hessian.phases: 'R3m' is not defined" in result.output
        and "Traceback" not in result.output
    )
    assert not (tmp_path / "campaign").exists()


def test_a_structure_file_that_is_missing_or_of_another_phase_is_refused(tmp_path, fakes):
    file = write_campaign(
        tmp_path, phases=[{"name": "Im-3m", "structure": "cubic.vasp", "space_group": 160}]
    )
    with pytest.raises(
        InputError, match=r"phases\.Im-3m\.structure.*has the space group Im-3m \(229\), not 160"
    ):
        driver.run_campaign(file)
    (tmp_path / "cubic.vasp").unlink()
    with pytest.raises(InputError, match="no such file"):
        driver.run_campaign(file)


def test_a_mode_that_the_phase_does_not_have_is_refused_before_any_work(tmp_path, fakes):
    file = write_campaign(tmp_path, hessian={"phases": [{"name": "Im-3m", "irreps": ["T2g"]}]})
    with pytest.raises(
        InputError, match="T2g: this phase has no such optical mode at Gamma; it has T1u, T2u"
    ):
        driver.run_campaign(file)
    assert fakes.calls == []


def test_every_step_runs_once_and_is_skipped_afterwards(tmp_path, fakes):
    file = write_campaign(tmp_path)
    records = driver.run_campaign(file)
    assert fakes.calls == IDS
    assert all(record.status == "done" for record in records.values())
    fakes.calls.clear()
    driver.run_campaign(file)
    assert fakes.calls == []


def test_a_changed_key_runs_what_depends_on_it_again_and_nothing_else(tmp_path, fakes):
    driver.run_campaign(write_campaign(tmp_path))
    fakes.calls.clear()
    driver.run_campaign(write_campaign(tmp_path, sscha={"settings": {"n_configs": 500}}))
    assert fakes.calls == ["sscha-100GPa", "dft", "report"]
    fakes.calls.clear()
    driver.run_campaign(
        write_campaign(
            tmp_path, sscha={"settings": {"n_configs": 500}}, learning={"settings": {"n_sample": 3}}
        )
    )
    assert fakes.calls == IDS


def test_a_step_whose_result_stays_the_same_does_not_repeat_those_that_need_it(tmp_path, fakes):
    file = write_campaign(tmp_path)
    driver.run_campaign(file)
    fakes.calls.clear()
    driver.run_campaign(file, only="merge")
    driver.run_campaign(file)
    assert fakes.calls == ["merge"]


def test_one_step_alone_needs_those_before_it(tmp_path, fakes):
    file = write_campaign(tmp_path)
    with pytest.raises(InputError, match="needs learn-075GPa, learn-125GPa, which are not done"):
        driver.run_campaign(file, only="merge")
    with pytest.raises(InputError, match="no such step; there are learn-075GPa"):
        driver.run_campaign(file, only="margin")
    driver.run_campaign(file, only="learn-125GPa")
    driver.run_campaign(file, only="learn-125GPa")
    assert fakes.calls == ["learn-125GPa"] * 2
    assert (tmp_path / "campaign" / "superseded" / "learn-125GPa-1").is_dir(), (
        "earlier labels are moved away, never deleted"
    )


def test_a_machine_error_stops_the_campaign_at_its_step_which_is_not_failed(tmp_path, fakes):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "hessian")

    fakes.acts["sscha-100GPa"] = full
    file = write_campaign(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        driver.run_campaign(file)
    assert dict(row[:2] for row in status(file).rows)["sscha-100GPa"] == "interrupted"
    before, fakes.acts = list(fakes.calls), {}
    assert all(record.status == "done" for record in driver.run_campaign(file).values())
    assert fakes.calls == [*before, *IDS[IDS.index("sscha-100GPa") :]]


def test_a_step_that_fails_stops_only_those_that_need_it(tmp_path, fakes):
    def fail():
        raise MagusAnharmonicError("all candidates melted")

    fakes.acts["sscha-100GPa"] = fail
    file = write_campaign(tmp_path)
    records = driver.run_campaign(file)
    assert (
        records["sscha-100GPa"].status == "failed"
        and records["sscha-100GPa"].reason == "all candidates melted"
    )
    assert records["dft"].status == "open" and records["dft"].reason == "waits for sscha-100GPa"
    assert records["hessian"].status == "done" and records["report"].status == "done"
    rows = list(read_rows(tmp_path / "campaign" / "tables" / "failures.csv"))
    assert {"step": "sscha-100GPa", "id": "", "reason": "all candidates melted"} in rows
    del fakes.acts["sscha-100GPa"]
    fakes.calls.clear()
    driver.run_campaign(file)
    assert fakes.calls == ["sscha-100GPa", "dft", "report"], (
        "the report of the incomplete campaign is made anew"
    )


def test_an_unexpected_error_of_one_step_is_its_reason_and_no_traceback(tmp_path, fakes):
    def fail():
        raise ZeroDivisionError("division by zero")

    fakes.acts["relax"] = fail
    assert (
        driver.run_campaign(write_campaign(tmp_path))["relax"].reason
        == "ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize("victim", ["learn-125GPa", "final", "sscha-100GPa", "report"])
def test_a_campaign_that_was_killed_goes_on_with_the_step_it_was_in(tmp_path, fakes, victim):
    file = write_campaign(tmp_path)
    fakes.acts[victim] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if child == 0:
        driver.run_campaign(file)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    record = read_records(tmp_path / "campaign")[victim]
    assert record.status == "running"
    assert f"{victim} is interrupted" in "\n".join(status(file).missing)
    fakes.acts.clear()
    records = driver.run_campaign(file)
    assert fakes.calls == IDS[IDS.index(victim) :]
    assert all(record.status == "done" for record in records.values())
    whole = driver.run_campaign(write_campaign(tmp_path / "whole"))
    assert [(r.key, r.output) for r in records.values()] == [
        (r.key, r.output) for r in whole.values()
    ]
    tables = [
        sorted(folder.glob("*.csv"))
        for folder in (tmp_path / "campaign/tables", tmp_path / "whole/campaign/tables")
    ]
    for one, other in zip(*tables, strict=True):
        assert one.name == "cost.csv" or one.read_bytes() == other.read_bytes()


def test_learning_goes_on_in_further_cycles_until_the_target_is_reached(tmp_path, fakes):
    fakes.rmse = [0.05, 0.02, 0.008, 0.001]
    records = driver.run_campaign(
        write_campaign(tmp_path, learning={"target_rmse": 0.01, "max_cycles": 5})
    )
    assert [name for name in records if name.startswith("final")] == [
        "final",
        "final-cycle2",
        "final-cycle3",
    ]
    merge = next(
        s for s in plan(load_campaign(tmp_path / "campaign.yaml"), 3) if s.id == "merge-cycle3"
    )
    assert len(merge.needs) == 6, "all labels of all cycles are merged"
    assert fakes.calls.index("final-cycle3") < fakes.calls.index("produce-050GPa")
    fakes.calls.clear()
    driver.run_campaign(tmp_path / "campaign.yaml")
    assert fakes.calls == []


def test_cut_errors_of_a_model_are_made_anew_and_bring_no_further_cycle(tmp_path, fakes):
    fakes.rmse = [0.05, 0.02, 0.008]
    file = write_campaign(tmp_path, learning={"target_rmse": 0.01, "max_cycles": 5})
    before = driver.run_campaign(file)
    fakes.calls.clear()
    cut = next((tmp_path / "campaign").rglob("errors-cycle2.json"))
    cut.write_text('{"finetuned": {"valid')
    after = driver.run_campaign(file)
    assert [call for call in fakes.calls if call != "report"] == ["final-cycle2"]
    assert after.keys() == before.keys() and all(
        record.status == "done" for record in after.values()
    )
    assert cut.with_name("errors-cycle2.json.damaged").is_file() and json.loads(cut.read_text())


def test_no_more_cycles_than_allowed(tmp_path, fakes):
    fakes.rmse = [0.05]
    records = driver.run_campaign(
        write_campaign(tmp_path, learning={"target_rmse": 0.01, "max_cycles": 2})
    )
    assert "final-cycle2" in records and "final-cycle3" not in records
    assert records["report"].status == "done"


def test_labels_of_other_dft_settings_are_not_mixed_with_those_here(tmp_path, fakes):
    driver.run_campaign(write_campaign(tmp_path))
    other = {"arguments": {"sigma": 1.2}}
    file = write_campaign(tmp_path, labeler=other)
    result = CliRunner().invoke(app, ["campaign", str(file)])
    assert result.exit_code == 2
    assert "results of other DFT settings" in result.output and "labeler" in result.output
    fakes.calls.clear()
    driver.run_campaign(write_campaign(tmp_path / "elsewhere", labeler=other))
    assert fakes.calls == IDS


def test_status_is_a_table_of_steps_counts_times_and_cost(tmp_path, fakes):
    file = write_campaign(tmp_path)
    before = status(tmp_path)
    assert [row[1] for row in before.rows[:-1]] == ["open"] * len(IDS) and len(
        before.missing
    ) == len(IDS)
    driver.run_campaign(file)
    after = status(file)
    assert after.missing == [] and [row[0] for row in after.rows] == [*IDS, "all"]
    assert after.rows[-1][3:6] == (str(2 * len(IDS)), str(10 * len(IDS)), str(3 * len(IDS)))
    for command in (["campaign", "status", str(tmp_path)], ["campaign", str(file), "--status"]):
        result = CliRunner().invoke(app, command)
        assert (
            result.exit_code == 0
            and "sscha-100GPa" in result.output
            and "Everything is done" in result.output
        )


def test_status_of_a_half_finished_campaign_says_what_is_missing(tmp_path, fakes):
    file = write_campaign(tmp_path)
    driver.run_campaign(file, only="learn-075GPa")
    result = CliRunner().invoke(app, ["campaign", "status", str(file)])
    assert result.exit_code == 0
    assert "final is open: the final model and Table I missing" in result.output


def test_status_while_another_process_runs_shows_its_progress(tmp_path, fakes):
    file = write_campaign(tmp_path)
    root = tmp_path / "campaign"
    running = StepRecord("running", "learn", 75.0, started="2026-01-01T00:00:00+00:00")
    write_records(root, {"learn-075GPa": running})
    (root / "learn-075GPa/results").mkdir(parents=True)
    (root / "learn-075GPa/results/gen1.traj").touch()
    with locked(root, "campaign"):
        row = status(file).rows[0]
        assert row[1] == "running" and "generation 1 of 2 reached" in row[-1] and row[2]
    assert status(file).rows[0][1] == "interrupted", "nobody holds the lock"


def test_both_commands_say_the_same_of_a_campaign_on_another_node(tmp_path, fakes, monkeypatch):
    file, root = write_campaign(tmp_path), tmp_path / "campaign"
    write_records(
        root,
        {"learn-075GPa": StepRecord("running", "learn", 75.0, started="2026-01-01T00:00:00+00:00")},
    )
    owner = {
        "host": "node17",
        "pid": 3999999,
        "machine": "another boot",
        "born": 1,
        "what": "campaign",
        "since": "",
        "token": "abc",
    }
    monkeypatch.setattr(folder_status, "WATCH", 3.0)
    stop = threading.Event()

    def beat():
        for count in itertools.count(1):
            write_json(root / "lock.json", owner | {"beat": count})
            if stop.wait(0.1):
                return

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        while not (root / "lock.json").is_file():
            time.sleep(0.01)
        assert folder_status.status(tmp_path).state == "running" == status(file).rows[0][1]
        assert "learn-075GPa is running" in status(file).missing[0]
    finally:
        stop.set()
        heart.join()
    monkeypatch.setattr(folder_status, "WATCH", 0.3)
    assert (
        folder_status.status(tmp_path).state.startswith("dead")
        and status(file).rows[0][1] == "interrupted"
    )
    (root / "tables").mkdir()
    page = campaign_contents(root)
    assert page.steps[0]["status"] == "interrupted" and "1 interrupted" in page.summary[0][1][0], (
        "the report says so too"
    )
    assert (
        script("explain").read_context(root / "tables").undone["learn-075GPa"] == "interrupted"
    ), "and so does validate"


def test_status_says_which_steps_changed_settings_made_old(tmp_path, fakes):
    driver.run_campaign(write_campaign(tmp_path))
    file = write_campaign(tmp_path, relax={"pressures": [50, 100]})
    words = {row[0]: row[1] for row in status(file).rows}
    assert words["relax"] == "outdated" and words["hessian"] == "done"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "list instead of keys"),
        ('{"relax": {"kind": "relax", "status": "odd"}}', "relax: status: "),
        ('{"relax": {"kind": "relax", "status": "done", "wall_s": "much"}}', "relax: wall_s: "),
    ],
)
def test_steps_that_cannot_be_read_are_a_clear_message(tmp_path, content, why):
    file = write_campaign(tmp_path)
    (tmp_path / "campaign").mkdir()
    (tmp_path / "campaign" / "steps.json").write_text(content)
    with pytest.raises(InputError, match=f"steps.json: damaged.*{why}.*; move it away"):
        status(file)


def test_the_key_of_a_step_holds_what_it_depends_on(tmp_path):
    steps = {step.id: step for step in plan(load_campaign(write_campaign(tmp_path)))}
    done = {name: StepRecord("done", "x", key="k", output="a") for name in steps}
    assert step_key(steps["final"], done) == step_key(steps["final"], done)
    other = {**done, "merge": done["merge"].changed(output="b")}
    assert step_key(steps["final"], other) != step_key(steps["final"], done)
    assert (
        step_key(steps["final"], {**done, "merge": done["merge"].changed(status="failed")}) is None
    )
