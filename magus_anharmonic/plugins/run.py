"""Stock MAGUS in this process, with the plug-ins loaded explicitly: what ``magus-anharmonic
search`` calls."""

from __future__ import annotations

import logging
from pathlib import Path

from magus_anharmonic import autoload
from magus_anharmonic.errors import InputError
from magus_anharmonic.settings import load_yaml, parse_settings

logger = logging.getLogger(__name__)


def run_stock_magus(input_file: str | Path, *, restart: bool = False, use_ml: bool = False) -> None:
    """The same as ``magus search -i input_file [-r] [-m]`` in the current folder.

    Raises InputError for wrong input, and when the package called ``magus`` is not the structure
    searcher.
    """
    data = load_yaml(input_file)
    parse_settings(data)
    if not autoload.is_magus():
        raise InputError(
            "MAGUS is not installed; use --host embedded, or pip install"
            " git+https://gitlab.com/bigd4/magus.git"
        )
    if restart and not (Path("results").is_dir() and Path("log.txt").is_file()):
        raise InputError(
            "-r: no results/ and log.txt in this folder to go on with; start without -r (a search"
            " of the embedded host: --host embedded)"
        )
    _log_as_magus_does()
    autoload.install()
    from magus.entrypoints.search import search

    autoload.load_plugins()
    search(input_file=data, use_ml=use_ml, restart=restart)


def _log_as_magus_does() -> None:
    from magus.logger import set_logger

    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    # A restart reads log.txt, so it must be written here too.
    set_logger(level="INFO", log_path="log.txt")
