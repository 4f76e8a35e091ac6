"""Whether the lowest phases are minima of the free energy: Hessians, saddle points, and what lies
below them.

A converged result whose Hessian has a mode negative beyond two standard errors is a saddle point.
It leaves the ranking, and a run in the subgroup that the mode leads to takes its place (its
`Run.followed`). Only the ensembles that a run left are used.

A Hessian sees no well beyond a barrier. Where the static energy falls along a mode and the motion
of the ions alone holds the symmetry, one run from down the deepest such mode is made before the
phase is called stable, until it is seen to end above.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from magus_anharmonic.errors import MagusAnharmonicError, SschaError, is_machine_error, one_line
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.elimination import MIN_POPULATIONS, Rules, Stop
from magus_anharmonic.ranking.jobs import (
    Job,
    Outcome,
    run_of,
    standing_of,
    stopped_run,
    with_result,
)
from magus_anharmonic.ranking.matcher import same_phase
from magus_anharmonic.ranking.phases import primitive_fingerprint
from magus_anharmonic.ranking.runs import Runs
from magus_anharmonic.ranking.store import FreeEnergyStore, Key, Run
from magus_anharmonic.sscha.hessian import SIGMAS, Hessian, free_energy_hessian, harmonic_hessian
from magus_anharmonic.sscha.result import SschaResult, final_ensemble
from magus_anharmonic.sscha.start import in_double_precision
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.unstable import down_the_mode
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import EV_IN_CM1, ev_to_mev

log = logging.getLogger(__name__)

DEPTH = 2
"""Saddle points one below the other that are followed from one candidate."""
SMALLEST_ENSEMBLE = 4
NO_RUN = "following it failed"
NOT_LOOKED = "not looked for a well down its deepest harmonic mode"


def check_stability(runs: Runs, key: Key, table: Callable[[], Sequence[Candidate]]) -> None:
    """Check the lowest ``sscha.hessian`` phases of each composition at ``key``, follow saddle
    points, until no new one is found. ``table`` : the candidates as they are known now, ranked."""
    seen = set[str]()
    _follow(runs, unfollowed(runs.store, runs.results(key)))
    while True:
        phases = [c for c in table() if 0 < (c.rank_quantum or 0) <= runs.sscha.hessian]
        new = [c.run for c in phases if c.run is not None and c.run.structure not in seen]
        if not new:
            return
        seen |= {run.structure for run in new}
        checked = [checked_run(run, runs.root / run.folder) for run in new]
        for run, before in zip(checked, new, strict=True):
            if run is not before:
                runs.store.put(looked_down(runs, run) if run.status == "stable" else run)
        _follow(runs, [run for run in checked if run.status == "saddle" and not run.followed])


def checked_run(run: Run, folder: Path) -> Run:
    """The run with the verdict of its Hessian; itself when it has one, has not converged, or kept
    no ensemble."""
    if run.free_energy.p_stable is not None or run.status != "converged":
        return run
    try:
        hessian = hessian_of_folder(folder)
    except MagusAnharmonicError as error:
        if is_machine_error(error):
            raise
        log.warning("%s: no Hessian: %s", run.structure, error)
        return run
    if hessian is None:
        log.info(
            "%s: not checked for being a saddle point: its run keeps no ensemble of its last state",
            run.structure,
        )
        return run
    changed = with_verdict(run, hessian)
    group = run.free_energy.space_group
    log.info("%s (%s): %s", run.structure, group, changed.reason or changed.status)
    return changed


def hessian_of_folder(folder: Path) -> Hessian | None:
    """Hessian (bubble) of the state in which the run in ``folder`` ended; None without its
    ensemble.

    Raises ``InputError`` for a folder of another version and ``SschaError`` for a state with
    imaginary modes.
    """
    if not (folder / "result.json").is_file():
        return None
    result = SschaResult.read(folder)
    ensemble = final_ensemble(folder, result)
    if ensemble is None or len(ensemble.energies) < SMALLEST_ENSEMBLE:
        return None
    state = result.state
    return free_energy_hessian(state, ensemble, Symmetry(state.atoms, state.supercell_matrix))


def with_verdict(record: Run, hessian: Hessian) -> Run:
    """The record with status, numbers and reason of a Hessian; undecided leaves the status."""
    q, mode = hessian.deciding
    lowest = float(hessian.hbar_omega[q, mode] * EV_IN_CM1)
    error = None if hessian.errors is None else float(hessian.hbar_omega_error[q, mode] * EV_IN_CM1)
    point = ", ".join(f"{value:g}" for value in hessian.points[q].round(4))
    found = (
        f"{'imaginary ' if lowest < 0 else ''}{abs(lowest):.0f}"
        f"{'' if error is None else f' +- {error:.0f}'} cm^-1 at q = ({point})"
    )
    words = {
        "stable": "",
        "saddle": f"saddle point: a mode is {found}",
        "undecided": (
            f"minimum or saddle point is undecided: a mode is {found} ({hessian.n_configs}"
            " configurations)"
        ),
    }
    return record.updated(
        status=record.status if hessian.status == "undecided" else hessian.status,
        reason=_joined(record.reason, words[hessian.status]),
        hessian_deciding=lowest,
        hessian_error=error,
        p_stable=float(hessian.probability_stable),
    )


def looked_down(runs: Runs, record: Run) -> Run:
    """A stable record with what the run from down its deepest imaginary harmonic mode came to
    (`Run.followed`).

    Itself where no harmonic mode is imaginary, or where the relaxation changed the space group. The
    run is made population by population and stopped when it can no longer end below.
    """
    if record.free_energy.space_group != record.free_energy.space_group_start:
        return record
    try:
        state = SschaResult.read(runs.root / record.folder).state
        harmonic = harmonic_hessian(state, in_double_precision(runs.evaluator))
        if harmonic.status != "saddle":
            return record
        job = runs.job(
            stripped(down_the_mode(harmonic, runs.evaluator, runs.sscha.symprec)), [record.key]
        )
    except MagusAnharmonicError as error:
        if is_machine_error(error):
            raise
        return _noted(record, f"{NOT_LOOKED}: {one_line(error)}")
    log.info(
        "%s: stable by the motion of the ions alone; looking down its deepest harmonic mode",
        record.structure,
    )
    follower = runs.store.get(job.structure, record.key)
    if follower is None:
        follower, why = _raced(runs, job, record)
        if follower is None:
            return _noted(record, f"{NOT_LOOKED}: {why}")
        runs.store.put(follower)
    words = (
        f"harmonic modes are imaginary; down the deepest, {outcome_of_following(record, follower)}"
    )
    return replace(_noted(record, words), followed=job.structure)


def _raced(runs: Runs, job: Job, above: Run) -> tuple[Run | None, str]:
    """The run of ``job`` until it has converged or is seen to end above ``above``; None and the
    reason when it may work another time."""
    sscha = runs.sscha
    z = Rules(sscha.confidence, 1, sscha.max_populations).z(2)
    limit = (above.gibbs or 0.0) + z * (above.gibbs_error or 0.0)
    few = sscha.model_copy(update={"allocation": "elimination"}).ranking_start
    record, stop = None, Stop()
    for count in range(1, sscha.max_populations + 1):
        outcomes: list[Outcome] = []
        options = {**job.options, "n_configs_start": few, "max_populations": count}
        runs.execute(
            [replace(job, options=options)], lambda _, found, own=outcomes: own.extend(found)
        )
        before = record
        record = run_of(job, above.key, outcomes[0], None, sscha.symprec, parent=above.structure)
        if record is None or record.gibbs is None:
            break
        if count >= MIN_POPULATIONS and standing_of(record, before).lower(z) > limit:
            stop = Stop(
                f"stopped after {count} populations: above {above.structure} ({z:.1f} sigma)",
                eliminated=True,
            )
            break
        if record.free_energy.converged or record.free_energy.n_populations < count:
            break
    final = runs.made(job, above.key, outcomes[0], None, parent=above.structure)
    return (None, outcomes[0].reason) if final is None else (stopped_run(final, stop), "")


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


def _noted(run: Run, note: str, own: str | None = None) -> Run:
    """The run with a note after its reason (or what of that is its ``own``)."""
    return run.updated(reason=_joined(run.reason if own is None else own, note))


def _follow(runs: Runs, saddles: Sequence[Run]) -> None:
    """Run each saddle's subgroup once, and write on the saddle what became of it."""
    jobs: dict[str, Job] = {}
    waiting: list[tuple[Run, str]] = []
    for saddle in saddles:
        name = _same_saddle(runs.store, saddle) or next(
            (name for other, name in waiting if _one_phase(other, saddle)), None
        )
        if name is None:
            if depth_of(runs.store, saddle) >= DEPTH:
                note = f"not followed: itself the {_ordinal(DEPTH)} step down"
                runs.store.put(_noted(saddle, note))
                continue
            try:
                job = follow_job(runs, saddle)
            except MagusAnharmonicError as error:
                if is_machine_error(error):
                    raise
                note = f"{NO_RUN}: {one_line(error)}"
                runs.store.put(_noted(saddle, note, _own_reason(saddle)))
                continue
            name = job.structure
            jobs[name] = job
        waiting.append((saddle, name))
    failures = _run_followers(runs, jobs, waiting)
    for saddle, name in waiting:
        follower = runs.store.get(name, saddle.key)
        if follower is None:
            # A defect of the machine, not of the structure: followed anew by the next ranking.
            note = f"{NO_RUN}: {failures.get(name, 'no result')}"
            runs.store.put(_noted(saddle, note, _own_reason(saddle)))
            continue
        told = _noted(saddle, outcome_of_following(saddle, follower), _own_reason(saddle))
        runs.store.put(replace(told, followed=name))
        back = follower.gibbs is not None and fell_back(saddle, follower)
        if back and follower.status != "saddle":
            told = _noted(follower, "came back to the saddle point above it")
            runs.store.put(told.updated(status="saddle"))


def _run_followers(
    runs: Runs, jobs: dict[str, Job], waiting: Sequence[tuple[Run, str]]
) -> dict[str, str]:
    """Run what is not known yet; reasons of those that may work another time."""
    parents = {name: saddle.structure for saddle, name in reversed(waiting)}
    failures: dict[str, str] = {}

    def done(job: Job, outcomes: list[Outcome]) -> None:
        (outcome,) = outcomes
        key = runs.key_at(outcome.temperature)
        found = runs.made(job, key, outcome, None, parent=parents[job.structure])
        if found is None:
            failures[job.structure] = outcome.reason
        else:
            runs.store.put(found)

    todo = [job for name, job in jobs.items() if runs.store.get(name, waiting[0][0].key) is None]
    if todo:
        log.info("%d of the lowest phases are saddle points; following them down", len(todo))
        runs.execute(todo, done)
    return failures


def _own_reason(record: Run) -> str:
    """The reason without what an earlier attempt to follow left there."""
    return record.reason.split(f"; {NO_RUN}")[0]


def follow_job(runs: Runs, record: Run) -> Job:
    """The run that starts from a saddle's centroids displaced along its unstable mode."""
    hessian = hessian_of_folder(runs.root / record.folder)
    if hessian is None:
        raise SschaError(f"{record.folder}: the ensembles of this saddle point are gone")
    start = down_the_mode(hessian, runs.evaluator, runs.sscha.symprec)
    return runs.job(stripped(start), [record.key])


def outcome_of_following(saddle: Run, follower: Run) -> str:
    """One sentence on the run that followed a saddle."""
    found = follower.free_energy
    name = f"followed to {follower.structure} ({found.space_group or found.space_group_start})"
    if follower.gibbs is None or saddle.gibbs is None:
        return f"{name}, which failed: {follower.reason}"
    if fell_back(saddle, follower):
        return f"{name}, which came back"
    if follower.status == "unconverged":
        return f"{name}, which is {follower.reason}"
    difference = ev_to_mev(follower.gibbs - saddle.gibbs)
    error = ev_to_mev(_noise(saddle, follower))
    where = (
        "lower"
        if difference < -SIGMAS * error
        else "not lower"
        if difference > SIGMAS * error
        else "as low within the noise"
    )
    return f"{name}, {where} ({difference:+.1f} +- {error:.1f} meV/atom)"


def _noise(a: Run, b: Run) -> float:
    return math.hypot(a.gibbs_error or 0.0, b.gibbs_error or 0.0)


def fell_back(saddle: Run, follower: Run) -> bool:
    """Whether the run that followed a saddle ended in the saddle's own phase."""
    return _one_phase(saddle, follower)


def _one_phase(a: Run, b: Run) -> bool:
    one, other = (primitive_fingerprint(record.phase, record.tolerance) for record in (a, b))
    return len(one.atoms) == len(other.atoms) and same_phase(one, other)


def _same_saddle(store: FreeEnergyStore, record: Run) -> str | None:
    """The run that followed the same phase before, from another structure."""
    others = (
        r
        for r in store.runs(record.key)
        if r.followed and r.status == "saddle" and r.structure != record.structure
    )
    return next((other.followed for other in others if _one_phase(other, record)), None)


def depth_of(store: FreeEnergyStore, record: Run) -> int:
    """How many saddle points lie above this run."""
    depth, name, seen = 0, record.structure, set[str]()
    while name not in seen:
        seen.add(name)
        above = next((r for r in store.runs(record.key) if r.followed == name), None)
        if above is None:
            break
        depth, name = depth + 1, above.structure
    return depth


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def followers(store: FreeEnergyStore, records: Sequence[Run]) -> list[tuple[Run, Run]]:
    """(saddle, follower) for every saddle, and every minimum that was left down a mode, among
    ``records`` and below; each follower once.

    As far as a phase of its own was found.
    """
    found: dict[str, tuple[Run, Run]] = {}
    queue = list(records)
    while queue:
        saddle = queue.pop(0)
        follower = (
            store.get(saddle.followed, saddle.key)
            if saddle.followed and saddle.status in ("saddle", "stable")
            else None
        )
        if (
            follower is None
            or follower.gibbs is None
            or follower.structure in found
            or fell_back(saddle, follower)
        ):
            continue
        found[follower.structure] = (saddle, follower)
        queue.append(follower)
    return list(found.values())


def unfollowed(store: FreeEnergyStore, records: Sequence[Run]) -> list[Run]:
    """Saddle points among ``records`` and below that an earlier ranking found and did not get to
    follow."""
    below = [follower for _, follower in followers(store, records)]
    saddles = {
        r.structure: r for r in [*records, *below] if r.status == "saddle" and not r.followed
    }
    return [record for record in saddles.values() if depth_of(store, record) < DEPTH]


def with_followers(
    candidates: Sequence[Candidate], store: FreeEnergyStore, records: Sequence[Run]
) -> list[Candidate]:
    """The candidates and what was found below saddle points: a row of its own, unless the run is
    that of a candidate."""
    found = list(candidates)
    for saddle, follower in followers(store, records):
        known = [
            index
            for index, candidate in enumerate(found)
            if candidate.run is not None and candidate.run.structure == follower.structure
        ]
        for index in known:
            found[index] = replace(found[index], parent=saddle.structure)
        if not known:
            found.append(_row_of(saddle, follower))
    return found


def _row_of(saddle: Run, follower: Run) -> Candidate:
    """No member of the population, and without static enthalpy."""
    where = "below the saddle point" if saddle.status == "saddle" else "down a harmonic mode of"
    reason = _joined(f"{where} {saddle.structure}", follower.reason)
    row = Candidate(
        id=follower.structure,
        atoms=stripped(follower.start),
        pressure=follower.key.pressure,
        temperature=follower.key.temperature,
        model=follower.key.model,
        spg_static=follower.free_energy.space_group_start,
        parent=saddle.structure,
    )
    return with_result(row, follower, follower).updated(reason=reason)
