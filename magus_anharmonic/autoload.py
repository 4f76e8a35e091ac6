"""Makes stock MAGUS find this package: a post-import hook on ``magus.calculators``.

ASE imports every entry point of its group ``ase.ioformats`` during ``import ase.io``, and MAGUS
imports ``ase.io`` first of all. Ours is `ase_format`; asking for it installs the hook. When
``magus.calculators`` has been imported, and the package really is MAGUS, the entry points of the
group ``magus.plugins`` are called. Where ``magus.calculators`` itself is what imports ASE, it is
too late to be around it, and the next module that every use of it imports takes its place. The
module that prepares surfaces and interfaces gets a check of ours before its minutes of work.
Nothing heavier than the standard library is imported here: every process that uses ASE runs this
module.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

GROUP = "magus.plugins"
TRIGGER = "magus.calculators"
_CALLED = "plugins_called_by_magus_anharmonic"
SURFACES = "magus.reconstruct.rcs_interface"
ASE_LIST = "ase._4.plugins.legacy_plugins"
TRIGGERS = (TRIGGER, "magus.calculators.base", "magus.search.search", SURFACES, ASE_LIST)
OWN_PLUGIN = ("magus-anharmonic", "magus_anharmonic.plugins:register")


def __getattr__(name: str) -> Any:
    if name != "ase_format":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    install()
    # ASE registers no format of another type, and would say so; its new list of plug-ins reads the
    # fields all the same, and `_unlist` takes ours out of it.
    warnings.filterwarnings("ignore", f"Failed to register external IO format {OWN_PLUGIN[0]}")
    fields = dict.fromkeys(("ext", "glob", "magic", "magic_regex"))
    return SimpleNamespace(desc="registers the plug-ins of MAGUS", code="1F", **fields)


def _unlist(module: ModuleType) -> None:
    """Take our entry, which reads and writes nothing, out of what ``ase info --formats`` lists."""
    known = module.__ase_plugins__
    module.__ase_plugins__ = {plugin for plugin in known if plugin.name != OWN_PLUGIN[0]}


class MagusFinder:
    """Meta path finder that finds nothing itself: it lets the others find the modules of `TRIGGERS`
    and extends their loading."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec of a module of `TRIGGERS` with our call after it; None for every other
        module."""
        if name not in TRIGGERS or self._busy:
            return None
        # The other finders may ask sys.meta_path again; without this flag two such hooks would call
        # each other for ever.
        self._busy = True
        try:
            spec = next(
                (found for finder in sys.meta_path if (found := _ask(finder, name, path, target))),
                None,
            )
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            _call_after(spec.loader, name)
        return spec


def _ask(finder: Any, name: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
    find = getattr(finder, "find_spec", None)
    return find(name, path, target) if find is not None else None


def _call_after(loader: Any, name: str) -> None:
    # Wrapped on the instance, so that the module's __loader__ stays what it is without us
    # (pickling, inspect, reload).
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        original(module)
        if name == ASE_LIST:
            _unlist(module)
            return
        # Python binds the submodule to its parent only after this returns; plug-ins may say
        # `magus.calculators` before.
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, module)
        if name == TRIGGER or _is_complete(TRIGGER):
            _load_once()
        hook = sys.modules.get("magus_anharmonic.plugins.hook")
        if name == SURFACES and hook is not None:
            hook.attach_to_surfaces(module)

    try:
        loader.exec_module = exec_module
    except AttributeError as error:
        _log().warning(
            "magus-anharmonic cannot attach to %s (%s); use `magus-anharmonic search`", name, error
        )


def _is_complete(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _load_once() -> None:
    """Call the plug-ins, unless they have been called, or this process is one calculation of a
    cluster job.

    Such a job is ``python -m magus.calculators.vasp``: it needs nobody's plug-ins, and each would
    load MAGUS's whole search. While the package of a module of ``python -m`` is imported, its name
    is not known yet: a later trigger looks again.
    """
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if sys.argv[:1] == ["-m"] or (main is not None and main.name.startswith(f"{TRIGGER}.")):
        return
    calculators = sys.modules[TRIGGER]
    if not getattr(calculators, _CALLED, False):
        setattr(calculators, _CALLED, True)
        load_plugins()


def install() -> None:
    """Put the hook in place, once; when ``magus.calculators`` is there already, load the plug-ins
    at once."""
    if not any(isinstance(finder, MagusFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MagusFinder())
    if _is_complete(TRIGGER):
        _load_once()


def is_magus() -> bool:
    """Whether the importable package called ``magus`` is the structure searcher (others share its
    name)."""
    try:
        return (
            importlib.util.find_spec("magus") is not None
            and importlib.util.find_spec("magus.entrypoints") is not None
        )
    except (ImportError, ValueError):
        return False


def load_plugins() -> list[str]:
    """Call every entry point of the group ``magus.plugins``, ours included even when it is not
    installed as a distribution.

    Returns the names of those that registered themselves. A plug-in that raises is logged and left
    out: a search without it must still start.
    """
    if not is_magus():
        return []
    from importlib.metadata import EntryPoint, entry_points

    # A dict by target: an editable install beside a wheel lists the same entry point twice.
    found = {point.value: point for point in entry_points(group=GROUP)}
    found.setdefault(OWN_PLUGIN[1], EntryPoint(*OWN_PLUGIN, GROUP))
    loaded = []
    for point in found.values():
        try:
            point.load()()
        except Exception:
            _log().exception("MAGUS plug-in %s (%s) could not be loaded", point.name, point.value)
        else:
            loaded.append(point.name)
    return loaded


def _log() -> Any:
    import logging

    return logging.getLogger(__name__)
