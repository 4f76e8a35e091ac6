"""A search that is killed, however often and wherever, and restarted finds exactly what it would
have found."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from kill_harness import Ended, Server, labels, outcome, prepare
from test_free_energy_search import INPUT as ON_FREE_ENERGY

pytestmark = [
    pytest.mark.full,  # in the fast suite test_golden kills a search in each part
    pytest.mark.skipif(
        sys.platform != "linux", reason="the harness forks and pins its searches to one core"
    ),
]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 128 + 15, signal.SIGINT: 128 + 2}


@dataclass(frozen=True)
class Reference:
    """The search that nobody killed."""

    ended: Ended
    found: dict[str, Any]

    @property
    def steps(self):
        """The names of its steps, in the order in which they were first made."""
        return list(dict.fromkeys(self.ended.steps))


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def reference(server, tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp("kill") / "reference")
    ended = server.search(folder)
    assert ended.code == 0, ended.text
    return Reference(ended, outcome(folder))


def can_restart(folder):
    return (folder / "results/anharmonic/run.json").exists()


def kill_again_and_again(server, folder, kills):
    """Start a search and kill it by each of ``kills`` (a named step or seconds, and the signal),
    then let it end; returns the hits."""
    hits = 0
    known = {}
    for when, number in kills:
        options = {"step": when} if isinstance(when, str) else {"after": when}
        ended = server.search(folder, restart=can_restart(folder), number=number, **options)  # type: ignore[arg-type]
        hits += was_hit(ended, when, number)
        now = {label[0]: label[2:] for label in labels(folder / "results/anharmonic/labels")}
        assert known.items() <= now.items(), f"{number.name} at {when}: a label was lost or changed"
        known = now
    ended = server.search(folder, restart=can_restart(folder))
    assert ended.code == 0, ended.text[-3000:]
    return hits


def was_hit(ended, when, number):
    """Whether the signal met the search; any other end than by it, or after the last step, is an
    error."""
    # A step that a restart need not make again (its file is there) is not met, and the search runs
    # to its end.
    expected = {CODES[number], 0} if isinstance(when, str) else {CODES[number], 0, -number}
    assert ended.code in expected, (
        f"{number.name} at {when}: exit code {ended.code}\n{ended.text[-3000:]}"
    )
    if ended.code > 0:
        last = ended.text.rstrip().splitlines()[-1]
        assert last.startswith(f"stopped by {number.name}; finished work is kept"), last
    return ended.code != 0


def kill_early(server, folder, after, number, step):
    """Start a search and kill it ``after`` so many seconds, or sooner: before it has made ``step``.

    Seconds of the reference are fewer steps or more where other programs come and go; a search that
    is past ``step`` would meet none of the kills that follow.
    """
    while True:
        ended = server.search(prepare(folder), after=after, number=number)
        if step not in ended.steps:
            assert was_hit(ended, after, number)
            return
        shutil.rmtree(folder)
        after /= 2


def assert_same(found, reference):
    different = sorted(
        key for key in {*found, *reference.found} if found.get(key) != reference.found.get(key)
    )
    shown = {
        key: (found.get(key), reference.found.get(key))
        for key in different
        if not isinstance(found.get(key), bytes)
    }
    assert not different, f"{different}\n{shown}"


def test_the_reference_does_everything_that_a_kill_could_spoil(reference):
    found = reference.found
    assert len(found["labels"]) == len({label[0] for label in found["labels"]}) >= 3
    assert (
        found["failures"]
        and found["free energies"]
        and len(found["models"]) == 2
        and not found["left over"]
    )
    names = " ".join(reference.steps)
    for part in (
        "init1.traj",
        "chunk-0.traj",
        "raw1.traj",
        "pending/gen001",
        "labels/gen001.xyz",
        "failures.jsonl",
        "gen2.pth.state",
        # fmt: skip
        "checkpoints/gen1.pth",
        "metrics.jsonl",
        "population_001.npz",
        "result.json",
        "ranking.csv",
        "search.json",
    ):
        assert part in names


def test_six_kills(server, reference, tmp_path):
    moment = random.Random(7).uniform(0.1, 0.6) * reference.ended.seconds
    pending = [
        name
        for name in reference.steps
        if name.startswith("rename results/anharmonic/labels/pending/gen002")
    ]
    kills = [
        ("rename results/raw1.traj", signal.SIGINT),
        ("rename results/anharmonic/checkpoints/gen1.pth", signal.SIGKILL),
        ("rename results/anharmonic/search.json", signal.SIGKILL),
        (pending[1], signal.SIGTERM),
        (
            next(name for name in reference.steps if name.endswith("population_002.npz")),
            signal.SIGKILL,
        ),
        (moment, signal.SIGKILL),
    ]
    folder = prepare(tmp_path / "search")
    assert kill_again_and_again(server, folder, kills) >= 5
    assert_same(outcome(folder), reference)


def test_a_search_on_the_free_energy_goes_on_where_it_was_killed(server, tmp_path):
    """In its labels, its training, a certifying run of SSCHA and its table."""
    whole = prepare(tmp_path / "whole", **ON_FREE_ENERGY)
    ended = server.search(whole)
    assert ended.code == 0, ended.text
    reference = Reference(ended, outcome(whole))
    assert reference.found["labels"] and reference.found["free energies"]
    parts = (
        ("labels/pending/gen001", 1),
        ("checkpoints/gen1.pth", 0),
        ("labels/pending/gen002", 0),
        ("population_002.npz", 0),
        ("ranking.csv", 0),
    )
    kills = [
        ([name for name in reference.steps if name.startswith("rename") and part in name][n], one)
        for (part, n), one in zip(parts, 2 * SIGNALS, strict=False)
    ]
    folder = prepare(tmp_path / "search", **ON_FREE_ENERGY)
    assert kill_again_and_again(server, folder, kills) >= 4
    assert_same(outcome(folder), reference)


@pytest.mark.parametrize("chain", range(10))
def test_kills_at_every_named_step_and_at_random_instants(server, reference, tmp_path, chain):
    """Every tenth named step, in order, each with another signal; a random instant goes first."""
    draw, named = random.Random(chain), reference.steps[chain::10]
    folder = tmp_path / "search"
    kill_early(
        server,
        folder,
        draw.uniform(0.0, 0.9) * reference.ended.seconds / 10,
        SIGNALS[chain % 3],
        named[0],
    )
    kills = [(name, draw.choice(SIGNALS)) for name in named]
    hits = kill_again_and_again(server, folder, kills)
    assert hits >= len(kills) - 3, f"{hits} of {len(kills)} kills hit"
    assert_same(outcome(folder), reference)
