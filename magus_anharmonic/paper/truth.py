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
from magus_anharmonic.settings import Settings, SschaSettings
from magus_anharmonic.sscha.record import MINIMA
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.units import ev_to_mev

log = logging.getLogger(__name__)


def labels_of(settings: Settings, run_dir: str | Path) -> Truth | None:
    """What `rank` asks for ``sscha.truth``: the lowest ``sscha.keep_best`` phases of each
    composition, as far as they have converged, are labelled into ``run_dir/truth/RUN``; None
    without that key.

    Each gets 20 labels, and more up to ``truth_labels``, until the error of its correction is below
    ``truth_error``. What is labelled is not labelled again. A phase whose labels fail has no term;
    ``failures.jsonl`` says why. The labeler is checked now: raises ``InputError``.
    """
    sscha = settings.sscha
    if sscha is None or (labels := sscha.truth) is None:
        return None
    folder = SearchFolder(run_dir)
    place = folder.truth / "labeling", settings, "sscha.truth"
    get_labeler(labels, *place).close()

    def truth(table: Sequence[Candidate], model: Evaluator) -> Mapping[str, ModelTerm]:
        lowest = [
            c for c in table if 0 < (c.rank_quantum or 0) <= sscha.keep_best and c.status in MINIMA
        ]
        with contextlib.closing(get_labeler(labels, *place)) as labeler:
            found = {c.id: _term(folder, c, model, labeler, sscha) for c in lowest}
        return {name: term for name, term in found.items() if term is not None}

    return truth


def _term(
    folder: SearchFolder,
    candidate: Candidate,
    model: Evaluator,
    labeler: Labeler,
    sscha: SschaSettings,
) -> ModelTerm | None:
    name = candidate.sscha_folder
    try:
        run = folder.sscha / name
        source = source_of_run(run, SschaResult.read(run), candidate.id)
        report = measure_errors(
            source,
            model,
            labeler,
            folder.truth / name,
            n_configs=sscha.truth_labels,
            wanted=sscha.truth_error,
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
