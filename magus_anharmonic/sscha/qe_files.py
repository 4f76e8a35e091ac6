"""Files that SSCHA users exchange: dynamical matrices in Quantum ESPRESSO's format, ensembles of
python-sscha.

Two formats of ensembles: binary (``energies_popN.npy`` ..., with the dynamical matrices
``dyn_gen_popN_*``) and the text files of a ``data_dir`` (``energies_supercell_populationN.dat``
..., dynamical matrices beside them or given). Supercell atoms are in the order of this package,
which is python-sscha's. Its units: Ry, A (binary) or bohr (text), Ry/bohr^3 with the opposite sign
of the stress.

An ensemble from elsewhere is read only where it is what it claims: finite, of pairs, drawn from
its state at its temperature, of one piece. A sample tells its state: in every mode <Q^2> is the
variance that phonon energy and temperature give, u Psi^-1 u = 1 per mode, to 1/sqrt(pairs). So
another temperature, other masses, or the matrices that a minimisation led to, are seen.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import chdtr, chdtrc, chdtri

from magus_anharmonic.errors import InputError, one_line, typed_line
from magus_anharmonic.gate import check_structure
from magus_anharmonic.io.files import raise_machine_error
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.state import (
    SschaState,
    agree,
    fold,
    root_mass,
    same_gaussian,
    sum_rule,
    variance,
)
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import BOHR, RYDBERG, ev_per_a3_to_gpa

log = logging.getLogger(__name__)

NOISE_OF_MATRICES = 0.02
"""Of the largest force constant: what symmetrising may change without a warning."""
THEIR_BOHR = 1.0 / 1.889725989
"""Angstrom; python-sscha's own constant, in which it writes and reads its text files."""
STRESS = -RYDBERG / BOHR**3


def state_from_dyn(prefix: str | Path, temperature: float = 0.0) -> SschaState:
    """The state of the dynamical matrices ``prefix1`` ... ``prefixN``, with the symmetry of their
    crystal.

    Species may be labelled as pw.x allows it (``H1``, ``H_pbe``, ``h``, ``D``); masses are those of
    the files. Raises ``InputError`` when files are not there or damaged, by their name.
    """
    state = _as_written(prefix, temperature)
    symmetric = Symmetry(state.atoms, state.supercell_matrix).force_constants(state.force_constants)
    change = np.abs(symmetric - state.force_constants).max() / max(np.abs(symmetric).max(), 1e-12)
    if change > NOISE_OF_MATRICES:
        log.warning(
            "%s: they break the symmetry of their crystal by %.1f per cent of the largest;"
            " symmetrised",
            prefix,
            100 * change,
        )
    return replace(state, force_constants=symmetric)


def _as_written(prefix: str | Path, temperature: float) -> SschaState:
    """As `state_from_dyn`, without the symmetry: what an ensemble was drawn from."""
    from magus_anharmonic.sscha.python_sscha import read_dynamical_matrices

    with tempfile.TemporaryDirectory(prefix="sscha-") as scratch:
        try:
            state = read_dynamical_matrices(prefix, temperature, Path(scratch) / "log")
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # cellconstructor raises whatever it stumbles over
            raise_machine_error(error, f"{prefix}1")
            why = typed_line(error, 200)
            raise InputError(
                f"start: {prefix}1, ...: not readable as dynamical matrices of Quantum ESPRESSO"
                f" ({why})"
            ) from None
    check_structure(state.atoms, f"start: {prefix}1")
    return replace(state, force_constants=fold(sum_rule(state.full), state.supercell_matrix))


def write_dyn(state: SschaState, prefix: Path, force_constants: np.ndarray | None = None) -> None:
    """Write ``prefix1`` ... ``prefixN``: the force constants of ``state``, or others of its
    supercell (a Hessian)."""
    from magus_anharmonic.sscha.python_sscha import write_dynamical_matrices

    prefix.parent.mkdir(parents=True, exist_ok=True)
    chosen = state if force_constants is None else replace(state, force_constants=force_constants)
    with tempfile.TemporaryDirectory(prefix="sscha-") as scratch:
        write_dynamical_matrices(chosen, prefix, Path(scratch) / "log")


def write_ensemble(
    state: SschaState, ensemble: Ensemble, folder: Path, population: int = 1, *, text: bool = False
) -> None:
    """Write an ensemble for python-sscha's ``load_bin`` or, with ``text``, its ``load``; the state
    goes beside it as ``dyn_gen_popN_*``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_dyn(state, folder / f"dyn_gen_pop{population}_")
    ensemble = ensemble.of_the_truth(str(folder))
    energies, forces = ensemble.energies / RYDBERG, ensemble.forces / RYDBERG
    stresses = ensemble.stresses / STRESS
    positions = state.supercell.positions + ensemble.displacements
    if not text:
        arrays = {"xats": positions, "forces": forces, "stresses": stresses, "energies": energies}
        for name, values in arrays.items():
            np.save(folder / f"{name}_pop{population}.npy", values)
        return
    cell = "\n".join(" ".join(f"{x:.16f}" for x in row) for row in state.supercell.cell.array)
    symbols = state.supercell.get_chemical_symbols()
    for index, u in enumerate(ensemble.displacements):
        name = f"population{population}_{index + 1}.dat"
        np.savetxt(folder / f"u_{name}", u / THEIR_BOHR)
        np.savetxt(folder / f"forces_{name}", forces[index] * THEIR_BOHR)
        np.savetxt(folder / f"pressures_{name}", stresses[index])
        rows = zip(symbols, positions[index], strict=True)
        atoms = "\n".join(f"{symbol} {x:.16f} {y:.16f} {z:.16f}" for symbol, (x, y, z) in rows)
        (folder / f"scf_{name}").write_text(
            f"CELL_PARAMETERS angstrom\n{cell}\n\nATOMIC_POSITIONS angstrom\n{atoms}\n",
            encoding="utf-8",
        )
    np.savetxt(folder / f"energies_supercell_population{population}.dat", energies)


def read_ensemble(
    folder: str | Path,
    temperature: float,
    population: int | None = None,
    dyn: str | Path | None = None,
) -> tuple[SschaState, Ensemble]:
    """State and ensemble from a folder of python-sscha, binary or text; the last population unless
    one is named.

    The state is the one that drew the ensemble: ``dyn_gen_popN_`` or ``dyn_start_populationN_`` in
    the folder (or in the working folder of python-sscha, its parent), where there is none the
    prefix ``dyn``. Raises ``InputError`` naming what is missing, does not fit, or is not what it
    claims to be, and for a ``dyn`` that is another one than the folder's.
    """
    folder = Path(folder)
    number, binary = _population(folder, population)
    where = f"ensemble: {folder}: population {number}"
    own = generating_matrices(folder, number)
    if own is None and dyn is None:
        raise InputError(
            f"{where}: no dynamical matrices of it (dyn_gen_pop{number}_1); give the prefix of"
            " those that drew it"
        )
    state = _as_written(own or str(dyn), temperature)
    if own is not None and dyn is not None:
        other = _as_written(dyn, temperature)
        if not same_gaussian(state, other) or not agree(state, other, "atoms.positions", atol=1e-6):
            raise InputError(
                f"{where}: was drawn from {own}, and {dyn} is another state; leave it out"
            )
    try:
        ensemble = Ensemble(*(_binary if binary else _text)(folder, number, state))
    except Exception as error:  # NumPy's readers raise many types for a damaged file
        raise_machine_error(error, folder)
        raise InputError(f"{where}: {one_line(error)}") from None
    count, atoms = ensemble.energies.size, len(state.supercell)
    shapes = (count, atoms, 3), (count,), (count, atoms, 3), (count, 3, 3)
    read = list(vars(ensemble).items())[: len(shapes)]  # the level is no number of the files
    for (name, values), expected in zip(read, shapes, strict=True):
        if values.shape != expected or not np.issubdtype(values.dtype, np.floating):
            raise InputError(
                f"{where}: {name} are {values.dtype} of the shape {values.shape}, not numbers of"
                f" {expected}"
            )
    return state, checked_ensemble(state, ensemble, where)


def generating_matrices(folder: str | Path, population: int | None = None) -> Path | None:
    """Prefix of the dynamical matrices from which an ensemble of python-sscha was drawn; None where
    neither folder nor parent has them."""
    number, _ = _population(Path(folder), population)
    inside, start = Path(folder) / f"dyn_gen_pop{number}_", f"dyn_start_population{number}_"
    prefixes = [inside, Path(folder) / start, Path(folder).resolve().parent / start]
    return next((prefix for prefix in prefixes if Path(f"{prefix}1").is_file()), None)


def _population(folder: Path, wanted: int | None) -> tuple[int, bool]:
    """Number of a population, the last unless one is wanted, and whether it is in the binary
    format."""
    if not folder.is_dir():
        raise InputError(f"ensemble: {folder}: no such folder")
    binary, text = (
        {int(found[1]) for path in folder.iterdir() if (found := re.fullmatch(form, path.name))}
        for form in (r"energies_pop(\d+)\.npy", r"energies_supercell_population(\d+)\.dat")
    )
    if not binary | text:
        raise InputError(
            f"ensemble: {folder}: holds neither energies_popN.npy nor"
            " energies_supercell_populationN.dat"
        )
    number = max(binary | text) if wanted is None else wanted
    if number not in binary | text:
        there = sorted(binary | text)
        raise InputError(f"ensemble: {folder}: has no population {number} (there are {there})")
    return number, number in binary


def _binary(
    folder: Path, number: int, state: SschaState
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    energies, forces, positions = (
        np.load(folder / f"{name}_pop{number}.npy", allow_pickle=False)
        for name in ("energies", "forces", "xats")
    )
    stress = folder / f"stresses_pop{number}.npy"
    stresses = np.load(stress, allow_pickle=False) * STRESS if stress.is_file() else np.zeros(0)
    return (
        positions - state.supercell.positions,
        energies * RYDBERG,
        np.ascontiguousarray(forces) * RYDBERG,
        _or_none(stresses, energies),
    )


def _text(
    folder: Path, number: int, state: SschaState
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    energies = np.loadtxt(folder / f"energies_supercell_population{number}.dat", ndmin=1)
    names = [f"population{number}_{index}.dat" for index in range(1, len(energies) + 1)]
    found = len(list(folder.glob(f"u_population{number}_*.dat")))
    if found != len(names):
        raise InputError(
            f"{len(names)} energies, and {found} files u_population{number}_*.dat: one of them is"
            " cut or incomplete"
        )

    def read(what: str) -> np.ndarray:
        return np.array([np.loadtxt(folder / f"{what}_{name}", ndmin=2) for name in names])

    there = any((folder / f"pressures_{name}").is_file() for name in names)
    stresses = read("pressures") * STRESS if there else np.zeros(0)
    forces = read("forces") * RYDBERG / THEIR_BOHR
    return read("u") * THEIR_BOHR, energies * RYDBERG, forces, _or_none(stresses, energies)


def _or_none(stresses: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """NaN where an ensemble has no stresses: no file, or the zeros that python-sscha writes; what
    is damaged is left to the checks."""
    if not stresses.any():
        return np.full((energies.size, 3, 3), np.nan)
    return np.where(np.isfinite(stresses), stresses, np.inf)


DOUBTFUL, SURE, SURE_OF_ONE = 1e-2, 1e-4, 1e-6
"""Probabilities below which a deviation is told, is none of chance over all modes, and is none of
chance in one mode."""
ENOUGH = 0.03
"""Part of the expected <u Psi^-1 u> by which it must be off to matter: it changes F by as small a
part of the anharmonic energy."""
SAME_POSITION = 1e-4
"""A."""
TEMPERATURES = np.concatenate([[0.0], np.geomspace(1.0, 2e4, 600)])
"""K, among which that of a sample is looked for."""
OUTLIER = 30.0
"""Robust standard deviations."""
HIGHEST_PRESSURE = 60.0
"""eV/A^3, 10 TPa."""
STEEPEST = 30.0
"""Of P V against the energy: a Grueneisen parameter of 15."""
STRANGE, IMPOSSIBLE = 1.6, 5.0
"""Factors between energies and -1/2 f u: a warning, and an end (quartic wells alone give 2)."""


def checked_ensemble(state: SschaState, ensemble: Ensemble, where: str) -> Ensemble:
    """The ensemble unwrapped, without drift, +u and -u next to each other; ``state`` is the one
    that drew it.

    Raises ``InputError`` that begins with ``where`` and says what is wrong, with the numbers (from
    1) of the configurations that are.
    """
    for name, values in vars(ensemble).items():
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        none = name == "stresses" and not np.isfinite(values).any()
        if not finite.all() and not none:
            raise InputError(f"{where}: {name} of {_listed(np.flatnonzero(~finite))}: not finite")
    u = _at_home(state, ensemble.displacements, where)
    order = _pairs(u, where)
    ensemble = replace(ensemble, displacements=u).part(order)
    require_sampled_from(state, ensemble.displacements, where)
    _require_one_surface(state, ensemble, order, where)
    problem = _stress_problem(state, ensemble)
    if problem:
        log.warning(
            "%s: its stresses are not used: %s; python-sscha keeps Ry/bohr^3, positive where the"
            " crystal is compressed",
            where,
            problem,
        )
        ensemble = replace(ensemble, stresses=np.full_like(ensemble.stresses, np.nan))
    return ensemble


def _stress_problem(state: SschaState, ensemble: Ensemble) -> str:
    """Why the stresses cannot be what they claim; empty where nothing says so.

    Of oscillators with the Grueneisen parameter gamma, P V changes by 2 gamma - 2/3 times the
    energy from one configuration to another (the atoms keep their fractional coordinates).
    """
    if not np.isfinite(ensemble.stresses).all():
        return ""
    pressures = -np.trace(ensemble.stresses, axis1=1, axis2=2) / 3.0
    if np.median(np.abs(pressures)) > HIGHEST_PRESSURE:
        return f"they are {ev_per_a3_to_gpa(np.median(pressures)):.2g} GPa, were they in GPa?"
    work = (pressures - pressures.mean()) * state.supercell.get_volume()
    energies = ensemble.energies - ensemble.energies.mean()
    both = float(work @ energies)
    norms = float(np.linalg.norm(work) * np.linalg.norm(energies))
    if abs(both) <= max(0.3, 5.0 / np.sqrt(len(work) / 2.0)) * norms:
        return ""
    slope = both / float(energies @ energies)
    said = f"P V changes by {slope:.2g} of the change of the energy"
    if abs(slope) > STEEPEST:
        gpa = ev_per_a3_to_gpa(-STRESS)
        factors = {"eV/A^3": -STRESS, "GPa": gpa, "kbar": 10.0 * gpa}
        unit = min(factors, key=lambda name: abs(np.log(abs(slope) / (2.0 * factors[name]))))
        return f"{said}, in crystals by -5 to 5: they are in another unit ({unit}?)"
    if slope < -0.3:
        return f"{said}, which falls in few crystals (those that shrink when heated): another sign?"
    return ""


def _at_home(state: SschaState, displacements: np.ndarray, where: str) -> np.ndarray:
    """Displacements (n, N, 3) without the lattice vectors of wrapped atoms and without a shift of
    everything."""
    cell = state.supercell.cell.array
    shifts = np.round(displacements @ np.linalg.inv(cell))
    moved = np.flatnonzero(shifts.any(axis=(1, 2)))
    if len(moved):
        log.info(
            "%s: atoms of %d configurations were wrapped into the cell; taken back to their sites",
            where,
            len(moved),
        )
    masses = state.supercell.get_masses()
    u = displacements - shifts @ cell
    return u - (np.einsum("a,caj->cj", masses, u) / masses.sum())[:, None]


def _pairs(displacements: np.ndarray, where: str) -> np.ndarray:
    """(n,) order in which every configuration is followed by its mirror image."""
    flat = displacements.reshape(len(displacements), -1)
    points = flat @ np.random.default_rng(0).standard_normal((flat.shape[1], 3))
    tree = cKDTree(points)
    near = tree.query(points, k=2)[1][:, 1] % len(points)
    same = np.abs(flat[near] - flat).max(axis=1) < SAME_POSITION
    double = np.flatnonzero(same)
    if len(double) and len(points) > 1:
        raise InputError(f"{where}: {_listed(double)} are the same configuration")
    partner = tree.query(-points)[1]
    alone = np.flatnonzero(np.abs(flat[partner] + flat).max(axis=1) > SAME_POSITION)
    if len(alone):
        raise InputError(
            f"{where}: no mirror image -u (about the centroids of these dynamical matrices) of"
            f" {_listed(alone)}; averages are over pairs (python-sscha: generate(evenodd=True)),"
            " and a missing partner or another centroid spoils them"
        )
    first = np.flatnonzero(np.arange(len(partner)) < partner)
    return np.stack([first, partner[first]], axis=1).ravel()


def require_sampled_from(state: SschaState, displacements: np.ndarray, where: str) -> None:
    """Raise ``InputError`` unless pairs of displacements (n, N, 3) A have, mode by mode, the
    variances of ``state``.

    The message has the temperature that fits where one does.
    """
    hbar_omega, at = state.modes.hbar_omega, state.temperature
    if np.any(hbar_omega <= 0):
        raise InputError(
            f"{where}: the dynamical matrices have imaginary modes; no ensemble can have been drawn"
            " from them"
        )
    half = displacements[0::2].reshape(len(displacements) // 2, -1)
    n = len(half)
    squares = np.square((half * root_mass(state.supercell)) @ state.modes.vectors).mean(axis=0)
    deviance = n * np.array(
        [np.sum(np.log(v := variance(hbar_omega, t)) + squares / v) for t in TEMPERATURES]
    )
    ratios = squares / variance(hbar_omega, at)
    if _belongs(ratios, n):
        likely = TEMPERATURES[deviance - deviance.min() < chdtri(1, 0.05)]
        said = "%s: fits %g K; by its displacements alone between %.0f and %.0f K (95 per cent)"
        log.info(said, where, at, *likely[[0, -1]])
        if _is_off(ratios, n, DOUBTFUL):
            said = "%s: <u Psi^-1 u> is %.2f of what it is at %g K, hardly by chance: made there?"
            log.warning(said, where, ratios.mean(), at)
        return
    best = float(TEMPERATURES[int(np.argmin(deviance))])
    fits = _belongs(squares / variance(hbar_omega, best), n)
    hint = (
        f"{best:.0f} K would fit: give the temperature at which it was made (--temperature), if"
        " these matrices drew it"
        if fits
        else "No temperature fits: these are not the matrices (or the masses) that drew it"
    )
    raise InputError(
        f"{where}: was not drawn from these dynamical matrices at {at:g} K: <u Psi^-1 u> is"
        f" {ratios.mean():.2f} of what it should be, mode by mode {ratios.min():.2f} to"
        f" {ratios.max():.2f}. {hint}; python-sscha draws ensemble N from dyn_gen_popN_, and"
        " dyn_popN_ is where it led to"
    )


def _chance(value: np.ndarray | float, degrees: int) -> np.ndarray:
    """Probability that a chi squared is as far off, to either side."""
    return 2.0 * np.minimum(chdtrc(degrees, value), chdtr(degrees, value))


def _is_off(ratios: np.ndarray, n: int, doubt: float) -> bool:
    """Whether the mean of all modes is off by more than chance and enough to matter."""
    chance = _chance(n * ratios.sum(), n * len(ratios))
    return bool(chance < doubt and abs(ratios.mean() - 1.0) > ENOUGH)


def _belongs(ratios: np.ndarray, n: int) -> bool:
    """Whether mean squares over n independent configurations, over what they should be, are one."""
    sure = len(ratios) * _chance(n * ratios, n) < SURE_OF_ONE
    return not _is_off(ratios, n, SURE) and not np.any(sure & (np.abs(ratios - 1.0) > 2.0 * ENOUGH))


def _require_one_surface(
    state: SschaState, ensemble: Ensemble, order: np.ndarray, where: str
) -> None:
    """Energies, forces and stresses that belong to the displacements, to each other, and to one
    energy surface in one unit."""
    u = ensemble.displacements.reshape(len(order), -1)
    work = -0.5 * np.einsum("ci,ci->c", ensemble.forces.reshape(u.shape), u)
    rest = ensemble.energies - work
    scale = max(_robust(rest), 0.05 * _robust(ensemble.energies), 1e-9)
    off = np.abs(rest - np.median(rest))
    strained = np.linalg.norm(ensemble.stresses - np.median(ensemble.stresses, axis=0), axis=(1, 2))
    strain = max(float(np.median(strained)), 1e-9)
    for values, usual, what in (
        (off, scale, "energy and forces"),
        (strained, strain, "the stresses"),
    ):
        outside = np.flatnonzero(values > OUTLIER * usual)
        if len(outside):
            raise InputError(
                f"{where}: {what} of {_listed(order[outside])} do not belong to the others"
            )
    curvature = work.mean() / (
        0.5 * np.einsum("ci,ij,cj->c", u, state.full, u, optimize=True).mean()
    )
    if not 0.08 < curvature < 12.0:
        raise InputError(
            f"{where}: the forces are {curvature:.3g} times those of the dynamical matrices:"
            " another sign, another unit (they must be Ry/A, in text files Ry/bohr), or another"
            " order of atoms"
        )
    energies = ensemble.energies - ensemble.energies.mean()
    work = work - work.mean()
    alike = float(energies @ work / max(np.linalg.norm(energies) * np.linalg.norm(work), 1e-300))
    slope = float(energies @ work / max(work @ work, 1e-300))
    if len(order) >= 20 and (alike < 0.1 or not 1 / IMPOSSIBLE < slope < IMPOSSIBLE):
        raise InputError(
            f"{where}: the energies do not belong to the forces (they change by {slope:.3g} of -f"
            f" u/2, correlation {alike:.2f}): another order, another unit (Ry per supercell, Ry/A),"
            " or per cell instead of per supercell"
        )
    if len(order) >= 20 and not 1 / STRANGE < slope < STRANGE:
        log.warning(
            "%s: the energies change by %.2f of -f u/2 (1 if harmonic): strongly anharmonic, or"
            " forces in another unit",
            where,
            slope,
        )


def _robust(values: np.ndarray) -> float:
    """Standard deviation of the bulk of the values, from their median absolute deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _listed(indices: Iterable[int]) -> str:
    """``configurations 3, 8, 9 ... (12 in all)``, counted from 1."""
    numbers = sorted(int(index) + 1 for index in indices)
    more = f" ... ({len(numbers)} in all)" if len(numbers) > 4 else ""
    return (
        f"configuration{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:4]))}{more}"
    )
