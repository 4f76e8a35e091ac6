"""Whether the lowest phases are minima of the free energy: Hessians, saddle points, and what lies
below them.

A converged result whose Hessian has a mode negative beyond two standard errors is a saddle point.
It leaves the ranking, and a run in the subgroup that the mode leads to takes its place (its
`Record.followed`). Only the ensembles that a run left are used.

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
from typing import TYPE_CHECKING, Any

from magus_anharmonic.errors import MagusAnharmonicError, SschaError, is_machine_error, one_line
from magus_anharmonic.ranking.candidate import CONVERGED, Candidate
from magus_anharmonic.ranking.elimination import MIN_POPULATIONS, Rules, Stop
from magus_anharmonic.ranking.jobs import (
    Job,
    Outcome,
    Workers,
    record_of,
    run_jobs,
    standing_of,
    stopped_record,
    with_result,
)
from magus_anharmonic.ranking.matcher import same_phase
from magus_anharmonic.ranking.phases import primitive_fingerprint
from magus_anharmonic.ranking.store import FreeEnergyStore, Key, Record
from magus_anharmonic.sscha.hessian import SIGMAS, Hessian, free_energy_hessian, harmonic_hessian
from magus_anharmonic.sscha.result import SschaResult, final_ensemble
from magus_anharmonic.sscha.start import in_double_precision
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.unstable import down_the_mode
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import EV_IN_CM1

if TYPE_CHECKING:
    from magus_anharmonic.ranking.rank import Ranking

log = logging.getLogger(__name__)

DEPTH = 2
"""Saddle points one below the other that are followed from one candidate."""
SMALLEST_ENSEMBLE = 4
NO_RUN = "following it failed"
NOT_LOOKED = "not looked for a well down its deepest harmonic mode"


def check_stability(
    ranking: Ranking, key: Key, free_energy: Callable[..., Any], workers: Workers
) -> None:
    """Check the lowest ``sscha.hessian`` phases of each composition at ``key``, follow saddle
    points, until no new one is found."""
    n_phases, seen = ranking.sscha.hessian, set[str]()
    _follow(ranking, unfollowed(ranking.store, ranking.results(key)), free_energy, workers)
    while True:
        phases = [
            candidate
            for candidate in ranking.table(key)
            if 0 < (candidate.rank_quantum or 0) <= n_phases
        ]
        records = [ranking.store.get(candidate.record, key) for candidate in phases]
        new = [record for record in records if record is not None and record.structure not in seen]
        if not new:
            return
        seen |= {record.structure for record in new}
        checked = [
            checked_record(record, ranking.run_dir / "sscha" / record.folder) for record in new
        ]
        for record, before in zip(checked, new, strict=True):
            if record is not before:
                ranking.put(
                    looked_down(ranking, record, free_energy, workers)
                    if record.status == "stable"
                    else record
                )
        _follow(
            ranking,
            [record for record in checked if record.status == "saddle" and not record.followed],
            free_energy,
            workers,
        )


def checked_record(record: Record, folder: Path) -> Record:
    """The record with the verdict of its Hessian; itself when it has one, has not converged, or
    kept no ensemble."""
    if record.p_stable is not None or record.status != "sscha":
        return record
    try:
        hessian = hessian_of_folder(folder)
    except MagusAnharmonicError as error:
        if is_machine_error(error):
            raise
        log.warning("%s: no Hessian: %s", record.structure, error)
        return record
    if hessian is None:
        log.info(
            "%s: not checked for being a saddle point: its run keeps no ensemble of its last state",
            record.structure,
        )
        return record
    changed = with_verdict(record, hessian)
    log.info("%s (%s): %s", record.structure, record.spg_quantum, changed.reason or changed.status)
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


def with_verdict(record: Record, hessian: Hessian) -> Record:
    """The record with status, numbers and reason of a Hessian; undecided leaves the status."""
    q, mode = hessian.lowest
    lowest = float(hessian.hbar_omega[q, mode] * EV_IN_CM1)
    error = (
        None
        if hessian.hbar_omega_error is None
        else float(hessian.hbar_omega_error[q, mode] * EV_IN_CM1)
    )
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
    return replace(
        record,
        status=record.status if hessian.status == "undecided" else hessian.status,  # type: ignore[arg-type]
        reason=_joined(record.reason, words[hessian.status]),
        hessian_lowest=lowest,
        hessian_error=error,
        p_stable=float(hessian.probability_stable),
    )


def looked_down(
    ranking: Ranking, record: Record, free_energy: Callable[..., Any], workers: Workers
) -> Record:
    """A stable record with what the run from down its deepest imaginary harmonic mode came to
    (`Record.followed`).

    Itself where no harmonic mode is imaginary, or where the relaxation changed the space group. The
    run is made population by population and stopped when it can no longer end below.
    """
    if record.spg_quantum != record.spg_static:
        return record
    try:
        state = SschaResult.read(ranking.run_dir / "sscha" / record.folder).state
        harmonic = harmonic_hessian(state, in_double_precision(ranking.evaluator))
        if harmonic.status != "saddle":
            return record
        job = ranking.job(
            stripped(down_the_mode(harmonic, ranking.evaluator, ranking.sscha.symprec)),
            [record.key],
        )
    except MagusAnharmonicError as error:
        if is_machine_error(error):
            raise
        return replace(record, reason=_joined(record.reason, f"{NOT_LOOKED}: {one_line(error)}"))
    log.info(
        "%s: stable by the motion of the ions alone; looking down its deepest harmonic mode",
        record.structure,
    )
    follower = ranking.store.get(job.structure, record.key)
    if follower is None:
        follower, why = _raced(ranking, job, record, free_energy, workers)
        if follower is None:
            return replace(record, reason=_joined(record.reason, f"{NOT_LOOKED}: {why}"))
        ranking.put(follower)
    words = (
        f"harmonic modes are imaginary; down the deepest, {outcome_of_following(record, follower)}"
    )
    return replace(record, followed=job.structure, reason=_joined(record.reason, words))


def _raced(
    ranking: Ranking, job: Job, above: Record, free_energy: Callable[..., Any], workers: Workers
) -> tuple[Record | None, str]:
    """The run of ``job`` until it has converged or is seen to end above ``above``; None and the
    reason when it may work another time."""
    sscha = ranking.sscha
    z = Rules(sscha.confidence, 1, sscha.max_populations).z(2)
    limit = (above.gibbs or 0.0) + z * (above.gibbs_error or 0.0)
    few = sscha.model_copy(update={"allocation": "elimination"}).ranking_start
    record, stop = None, Stop()
    for count in range(1, sscha.max_populations + 1):
        outcomes: list[Outcome] = []
        options = {**job.options, "n_configs_start": few, "max_populations": count}
        run_jobs(
            [replace(job, options=options)],
            ranking.evaluator,
            free_energy,
            lambda _, found, own=outcomes: own.extend(found),
            workers,
        )
        before, record = (
            record,
            record_of(job, above.key, outcomes[0], None, sscha.symprec, parent=above.structure),
        )
        if record is None or record.gibbs is None:
            break
        if count >= MIN_POPULATIONS and standing_of(record, before).lower(z) > limit:
            stop = Stop(
                f"stopped after {count} populations: above {above.structure} ({z:.1f} sigma)",
                eliminated=True,
            )
            break
        if record.status in CONVERGED or record.n_populations < count:
            break
    final = ranking.recorded(job, above.key, outcomes[0], None, parent=above.structure)
    return (None, outcomes[0].reason) if final is None else (stopped_record(final, stop), "")


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


def _follow(
    ranking: Ranking, saddles: Sequence[Record], free_energy: Callable[..., Any], workers: Workers
) -> None:
    """Run each saddle's subgroup once, and write on the saddle what became of it."""
    jobs: dict[str, Job] = {}
    waiting: list[tuple[Record, str]] = []
    for record in saddles:
        duplicate = _same_saddle(ranking.store, record) or next(
            (s for r, s in waiting if _one_phase(r, record)), None
        )
        if duplicate is None and depth_of(ranking.store, record) >= DEPTH:
            ranking.put(
                replace(
                    record,
                    reason=_joined(
                        record.reason, f"not followed: itself the {_ordinal(DEPTH)} step down"
                    ),
                )
            )
            continue
        if duplicate is None:
            try:
                job = follow_job(ranking, record)
            except MagusAnharmonicError as error:
                if is_machine_error(error):
                    raise
                ranking.put(
                    replace(
                        record, reason=_joined(_own_reason(record), f"{NO_RUN}: {one_line(error)}")
                    )
                )
                continue
            duplicate = job.structure
            jobs[duplicate] = job
        waiting.append((record, duplicate))
    parents = {name: record.structure for record, name in reversed(waiting)}
    failures: dict[str, str] = {}

    def done(job: Job, outcomes: list[Outcome]) -> None:
        (outcome,) = outcomes
        found = ranking.recorded(
            job, ranking.key_at(outcome.temperature), outcome, None, parent=parents[job.structure]
        )
        if found is None:
            failures[job.structure] = outcome.reason
        else:
            ranking.put(found)

    todo = [job for name, job in jobs.items() if ranking.store.get(name, saddles[0].key) is None]
    if todo:
        log.info("%d of the lowest phases are saddle points; following them down", len(todo))
        run_jobs(todo, ranking.evaluator, free_energy, done, workers)
    for record, name in waiting:
        follower = ranking.store.get(name, record.key)
        if follower is None:
            # A defect of the machine, not of the structure: followed anew by the next ranking.
            ranking.put(
                replace(
                    record,
                    reason=_joined(
                        _own_reason(record), f"{NO_RUN}: {failures.get(name, 'no result')}"
                    ),
                )
            )
        else:
            ranking.put(
                replace(
                    record,
                    followed=name,
                    reason=_joined(_own_reason(record), outcome_of_following(record, follower)),
                )
            )
            if (
                follower.gibbs is not None
                and follower.status != "saddle"
                and fell_back(record, follower)
            ):
                ranking.put(
                    replace(
                        follower,
                        status="saddle",
                        reason=_joined(follower.reason, "came back to the saddle point above it"),
                    )
                )


def _own_reason(record: Record) -> str:
    """The reason without what an earlier attempt to follow left there."""
    return record.reason.split(f"; {NO_RUN}")[0]


def follow_job(ranking: Ranking, record: Record) -> Job:
    """The run that starts from a saddle's centroids displaced along its unstable mode."""
    hessian = hessian_of_folder(ranking.run_dir / "sscha" / record.folder)
    if hessian is None:
        raise SschaError(f"{record.folder}: the ensembles of this saddle point are gone")
    start = down_the_mode(hessian, ranking.evaluator, ranking.sscha.symprec)
    return ranking.job(stripped(start), [record.key])


def outcome_of_following(saddle: Record, follower: Record) -> str:
    """One sentence on the run that followed a saddle."""
    name = f"followed to {follower.structure} ({follower.spg_quantum or follower.spg_static})"
    if follower.gibbs is None or saddle.gibbs is None:
        return f"{name}, which failed: {follower.reason}"
    if fell_back(saddle, follower):
        return f"{name}, which came back"
    if follower.status == "unconverged":
        return f"{name}, which is {follower.reason}"
    difference = 1000 * (follower.gibbs - saddle.gibbs)
    error = 1000 * _noise(saddle, follower)
    where = (
        "lower"
        if difference < -SIGMAS * error
        else "not lower"
        if difference > SIGMAS * error
        else "as low within the noise"
    )
    return f"{name}, {where} ({difference:+.1f} +- {error:.1f} meV/atom)"


def _noise(a: Record, b: Record) -> float:
    return math.hypot(a.gibbs_error or 0.0, b.gibbs_error or 0.0)


def fell_back(saddle: Record, follower: Record) -> bool:
    """Whether the run that followed a saddle ended in the saddle's own phase."""
    return _one_phase(saddle, follower)


def _one_phase(a: Record, b: Record) -> bool:
    one, other = (
        primitive_fingerprint(record.phase, record.symmetry_tolerance) for record in (a, b)
    )
    return len(one.atoms) == len(other.atoms) and same_phase(one, other)


def _same_saddle(store: FreeEnergyStore, record: Record) -> str | None:
    """The run that followed the same phase before, from another structure."""
    others = (
        r
        for r in store.records(record.key)
        if r.followed and r.status == "saddle" and r.structure != record.structure
    )
    return next((other.followed for other in others if _one_phase(other, record)), None)


def depth_of(store: FreeEnergyStore, record: Record) -> int:
    """How many saddle points lie above this run."""
    depth, name, seen = 0, record.structure, set[str]()
    while name not in seen:
        seen.add(name)
        above = next((r for r in store.records(record.key) if r.followed == name), None)
        if above is None:
            break
        depth, name = depth + 1, above.structure
    return depth


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def followers(store: FreeEnergyStore, records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """(saddle, follower) for every saddle, and every minimum that was left down a mode, among
    ``records`` and below; each follower once.

    As far as a phase of its own was found.
    """
    found: dict[str, tuple[Record, Record]] = {}
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


def unfollowed(store: FreeEnergyStore, records: Sequence[Record]) -> list[Record]:
    """Saddle points among ``records`` and below that an earlier ranking found and did not get to
    follow."""
    below = [follower for _, follower in followers(store, records)]
    saddles = {
        r.structure: r for r in [*records, *below] if r.status == "saddle" and not r.followed
    }
    return [record for record in saddles.values() if depth_of(store, record) < DEPTH]


def with_followers(
    candidates: Sequence[Candidate], store: FreeEnergyStore, records: Sequence[Record]
) -> list[Candidate]:
    """The candidates and what was found below saddle points: a row of its own, unless the run is
    that of a candidate."""
    found = list(candidates)
    for saddle, follower in followers(store, records):
        known = [
            index for index, candidate in enumerate(found) if candidate.record == follower.structure
        ]
        for index in known:
            found[index] = replace(found[index], parent=saddle.structure)
        if not known:
            found.append(_row_of(saddle, follower))
    return found


def _row_of(saddle: Record, follower: Record) -> Candidate:
    """No member of the population, and without static enthalpy."""
    where = "below the saddle point" if saddle.status == "saddle" else "down a harmonic mode of"
    reason = _joined(f"{where} {saddle.structure}", follower.reason)
    symmetry = {"spg_static": follower.spg_static, "parent": saddle.structure}
    row = Candidate(
        follower.structure,
        stripped(follower.start),
        follower.key.pressure,
        follower.key.temperature,
        None,
        follower.key.model,
        **symmetry,
    )
    return replace(with_result(row, follower, follower), reason=reason)
