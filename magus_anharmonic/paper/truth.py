"""Free energies of DFT from a few dozen labels a phase.

SSCHA samples and minimises with a model; labels of configurations of its final state correct G to
that of the labeler (`gradient_errors`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from magus_anharmonic.errors import MagusAnharmonicError, is_machine_error, one_line
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.base import Labeler
from magus_anharmonic.paper.ensemble_errors import measure_errors, source_of_run
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.rank import Truth
from magus_anharmonic.ranking.uncertainty import ModelTerm
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.runs.record import record_failure
from magus_anharmonic.settings import LabelerSettings, Settings
from magus_anharmonic.sscha.record import MINIMA
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.units import ev_to_mev

log = logging.getLogger(__name__)

MOST = 60
"""Labels of a phase."""
WANTED = 1e-3
"""eV/atom, of the correction of G."""


def labels_of(
    labels: LabelerSettings,
    settings: Settings,
    run_dir: str | Path,
    *,
    wanted: float = WANTED,
    most: int = MOST,
) -> Truth:
    """What `rank` asks for the truth: the lowest ``sscha.keep_best`` phases of each composition, as
    far as they have converged, are labelled into ``run_dir/truth/RUN``.

    Each gets 20 labels, and more up to ``most``, until the error of its correction is below
    ``wanted`` (eV/atom). What is labelled is not labelled again. A phase whose labels fail has no
    term; ``failures.jsonl`` says why. The labeler is checked now: raises ``InputError``.
    """
    folder = SearchFolder(run_dir)
    place = folder.truth / "labeling", settings
    get_labeler(labels, *place).close()

    def truth(table: Sequence[Candidate], model: Evaluator) -> Mapping[str, ModelTerm]:
        n_best = settings.sscha.keep_best if settings.sscha else 1
        lowest = [c for c in table if 0 < (c.rank_quantum or 0) <= n_best and c.status in MINIMA]
        with contextlib.closing(get_labeler(labels, *place)) as labeler:
            found = {c.id: _term(folder, c, model, labeler, wanted, most) for c in lowest}
        return {name: term for name, term in found.items() if term is not None}

    return truth


def _term(
    folder: SearchFolder,
    candidate: Candidate,
    model: Evaluator,
    labeler: Labeler,
    wanted: float,
    most: int,
) -> ModelTerm | None:
    name = candidate.sscha_folder
    try:
        run = folder.sscha / name
        source = source_of_run(run, SschaResult.read(run), candidate.id)
        report = measure_errors(
            source, model, labeler, folder.truth / name, n_configs=most, wanted=wanted
        )
    except MagusAnharmonicError as error:
        if is_machine_error(error):
            raise
        log.warning("%s: it has no correction of its own: %s", candidate.id, error)
        record_failure(folder.root, "truth", one_line(error), id=candidate.id)
        return None
    found = report.correction
    log.info(
        "%s: G by %s minus G by the model: %.2f +- %.2f meV/atom (%d labels)",
        candidate.id,
        labeler.description,
        ev_to_mev(found.total),
        ev_to_mev(found.error),
        found.n_labels,
    )
    return ModelTerm(found.total, found.error)
