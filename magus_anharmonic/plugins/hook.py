"""The hook around MAGUS's search: checks the input first, and after each round learns, re-evaluates and ranks.

``Magus.set_good_pop`` is the one place that every mode (plain, ``-m``, ``-p``) passes once per round in the main process, with the
relaxed and deduplicated population. Class attributes are wrapped, because the classes' names are bound elsewhere already.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
from magus.search.search import Magus

from magus_anharmonic.errors import InputError
from magus_anharmonic.lock import Held, check_free, read_owner
from magus_anharmonic.plugins.logs import check_restart, tame
from magus_anharmonic.plugins.modes import check_input, check_installation, is_mode, is_ours, single_thread
from magus_anharmonic.plugins.parameters import CALCULATOR_BLOCKS, OURS, concerns_us, fitness_names, misspelt_blocks, stop
from magus_anharmonic.plugins.rounds import Rounds
from magus_anharmonic.run_record import check_continues, check_results_version
from magus_anharmonic.settings import Settings, as_magus_reads, stages

logger = logging.getLogger(__name__)

# Beside the search objects, not on them: `magus search -p` pickles the whole object for its workers.
_ROUNDS: WeakKeyDictionary[Magus, Rounds] = WeakKeyDictionary()


def attach() -> None:
    """Wrap the methods of ``Magus``; once, however often it is called."""
    methods = (("__init__", _start), ("run", _to_the_end), ("update_volume_ratio", _before_round), ("set_good_pop", _after_round))
    for name, around in methods:
        original = Magus.__dict__[name]
        if not hasattr(original, "by_magus_anharmonic"):
            setattr(Magus, name, _wrapped(original, around))


def _attach_to_miner() -> None:
    """``-smfr`` gives a search a step of its own, which begins with another function than ours is around."""
    fly = sys.modules.get("magus.reconstruct.fly_interface")
    if fly is not None and not hasattr(fly.smfr_patch_to_Magus.update_volume_ratio, "by_magus_anharmonic"):
        step = _wrapped(fly.smfr_patch_to_Magus.update_volume_ratio, _before_round)
        fly.smfr_patch_to_Magus.update_volume_ratio = staticmethod(step)


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Magus, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(original, self), self, *args, **kwargs)

    method.by_magus_anharmonic = True  # type: ignore[attr-defined]
    return method


def _start(original: Callable[..., None], search: Magus, parameters: Any, restart: bool = False) -> None:
    keys = parameters.p_dict
    if not concerns_us(keys) and not misspelt_blocks(keys):
        original(parameters, restart=restart)
        return
    tame()
    ml = is_mode(search, "MLMagus")
    if "SSCHA" in fitness_names(keys) and "Comparator" not in keys:
        # MAGUS's own default looks at shapes alone, and would throw away what SSCHA is to tell apart.
        keys["Comparator"] = {"comparator_list": ["naive"]}
        logger.info("Comparator: naive (of equal structures: space group, volume within dV, energy within dE), because of Fitness: [SSCHA]")
    try:
        settings = check_input(keys, ml=ml, parallel=is_mode(search, "PaMagus"))
        for name in CALCULATOR_BLOCKS:
            # of a list of one stage MAGUS would make a chain, which has no model and cannot learn
            if name in keys and stages(block := as_magus_reads(keys[name])) == OURS:
                keys[name] = block
        run_dir = _run_dir(keys)
        if is_mode(search, "PaMagus"):
            single_thread()
        settings = check_installation(settings, run_dir)
        if not ml:
            # A block for `-m` may stand in the same input; here it plays no part.
            settings = settings.model_copy(update={"ml_calculator": {}})
        if restart:
            check_restart(Path("log.txt"))
            check_results_version(run_dir)
            if is_ours(settings, learner=ml):
                check_continues(run_dir, settings, "magus")
        _lock(search, run_dir, only_check=True)
        _seed_generators(settings, 0)
        original(parameters, restart=restart)
        _lock(search, run_dir)
        _ROUNDS[search] = Rounds.begin(search, settings, run_dir, restart=restart)
    except InputError as error:
        stop(error)


def _lock(search: Magus, run_dir: Path, *, only_check: bool = False) -> None:
    """Hold the lock of the results folder as long as ``search`` lives; raises ``InputError`` when another process holds it.

    First looked at before MAGUS moves an earlier ``results`` away, taken once the new folder is there.
    """
    owner = read_owner(run_dir)
    if owner is not None and owner.alive and owner.pid == os.getpid():
        return
    if only_check:
        check_free(run_dir)
        return
    held = Held(run_dir, "magus search")
    finalize(search, held.release)


def _run_dir(keys: Mapping[str, Any]) -> Path:
    return Path(keys["resultsDir"]) / "anharmonic"


def _to_the_end(original: Callable[..., None], search: Magus, *args: Any) -> None:
    _attach_to_miner()
    if search in _ROUNDS and is_mode(search, "MLMagus") and "one_step" in vars(search):
        stop(InputError("-m -smfr: the miner's step relaxes with MainCalculator and never trains; search with -m or with -smfr"))
    original(*args)
    rounds = _ROUNDS.get(search)
    if rounds is not None:
        try:
            rounds.conclude(search)
        except InputError as error:
            stop(error)


def _before_round(original: Callable[..., None], search: Magus) -> None:
    rounds = _ROUNDS.get(search)
    if rounds is not None:
        _seed_generators(rounds.settings, search.curgen)
        rounds.prepare(search)
        if rounds.repeats:
            # MAGUS reads the ratio with which this round began from its log, and would mix the volumes of the round before in once more.
            rounds.repeats = False
            return
    original()


def _seed_generators(settings: Settings, generation: int) -> None:
    # MAGUS draws from the global generators; seeded per round, a restarted search draws what it would have drawn.
    if settings.seed is not None:
        random.seed(f"{settings.seed} {generation}")
        np.random.seed([settings.seed % 2**32, generation])


def _after_round(original: Callable[..., None], search: Magus) -> None:
    rounds = _ROUNDS.get(search)
    if rounds is not None:
        try:
            rounds.finish(search)
        except InputError as error:
            stop(error)
    original()
