"""The engine ``python-sscha``: minimise the free energy on one ensemble, read and write dynamical
matrices.

The only module that imports ``sscha`` and ``cellconstructor``. Monacelli et al., J. Phys.: Condens.
Matter 33, 363001 (2021), doi:10.1088/1361-648X/ac066b.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers

from magus_anharmonic.errors import InputError, SschaError, one_line
from magus_anharmonic.sscha.engines import Minimised, Population
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.state import SschaState, atom_order, fold, fourier, inverse_fourier
from magus_anharmonic.sscha.supercells import (
    SupercellMatrix,
    commensurate,
    is_diagonal,
    n_cells,
    q_points,
)
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import HYDROGEN, kinds
from magus_anharmonic.units import AMU_IN_RYDBERG_MASS, BOHR, RYDBERG

os.environ.setdefault("SSCHA_JULIA_BACKEND", "none")
os.environ.setdefault("GFORTRAN_UNBUFFERED_PRECONNECTED", "y")

MEANINGFUL = 0.3
"""A gradient below this part of its statistical error ends the minimisation."""
STEPS = 60
"""Most steps on one ensemble."""

STEP_SIZES = (0.5, 0.1, 0.02)
"""First steps of the minimisation, tried one after the other (1 would be the self-consistent
solution)."""

NO_NUMBER = re.compile(
    r"(?i)(?<![\w.])[-+]?(nan|inf(inity)?)(?![a-z])|\*{3,}(?=[ \t]+[-.\d])|(?<=\d)[ \t]+\*{3,}"
)
"""What Fortran and C write for numbers that are none, or that do not fit."""
NOT_HERMITIAN = 1e-3
"""Of the largest element; files carry eight digits."""

_redirect = threading.RLock()


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send Python's and Fortran's standard output to ``log``; standard error (our progress lines)
    stays.

    Fortran writes to file descriptor 1, so that descriptor is redirected for the whole process:
    only around calls.
    """
    with _redirect, log.open("a", encoding="utf-8") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ValueError, io.UnsupportedOperation):
            sys.stdout.flush()
        saved = os.dup(1)
        try:
            os.dup2(file.fileno(), 1)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            file.flush()
            os.dup2(saved, 1)
            os.close(saved)


def minimise(
    populations: Sequence[Population], symmetry: Symmetry, *, min_effective_sample: float, log: Path
) -> Minimised:
    """Minimise F in centroids and force constants at fixed cell, until the effective sample falls
    below its minimum; on the last population, because python-sscha reweights one ensemble.

    The symmetry is imposed on the gradients by ``symmetry``, because python-sscha finds only the
    operations of standard orientations. Where a step empties the sample or makes modes imaginary,
    the minimisation begins again with smaller steps. Raises ``SschaError`` with python-sscha's own
    reason when the smallest fail too.
    """
    reason, (state, ensemble) = "", populations[-1]
    for step in STEP_SIZES:
        try:
            minimised = _minimise(state, ensemble, symmetry, min_effective_sample, step, log)
        except (ValueError, AssertionError, ArithmeticError, np.linalg.LinAlgError) as error:
            empty = isinstance(error, ArithmeticError)
            reason = "the effective sample size fell to zero" if empty else one_line(error)
            continue
        if np.all(minimised.state.modes.hbar_omega > 0):
            return minimised
        reason = "imaginary auxiliary modes after the minimisation"
    raise SschaError(f"python-sscha: {reason}")


def _minimise(
    state: SschaState,
    ensemble: Ensemble,
    symmetry: Symmetry,
    min_effective_sample: float,
    step: float,
    log: Path,
) -> Minimised:
    with quiet(log):
        import sscha.SchaMinimizer

        loaded = to_ensemble(state, ensemble)
        minimizer = sscha.SchaMinimizer.SSCHA_Minimizer(
            loaded,
            meaningful_factor=MEANINGFUL / np.sqrt(len(symmetry) * state.n_cells),
            kong_liu_ratio=min_effective_sample,
        )
        minimizer.min_step_dyn = minimizer.min_step_struc = step
        minimizer.max_ka = STEPS
        minimizer.neglect_symmetries = True
        minimizer.minim_struct = symmetry.centroids().shape[1] > 0
        # python-sscha would write error_dyn* into the working directory; with more retries the step
        # goes to zero instead
        minimizer.max_imag_freq_counter = minimizer.max_diag_error_counter = 1000
        minimizer.init(init_timer=False)
        minimizer.run(verbose=0, custom_function_gradient=_projector(minimizer, state, symmetry))
        return Minimised(
            state=from_phonons(minimizer.dyn, state, symmetry),
            effective_sample=float(loaded.get_effective_sample_size() / loaded.N),
            decrease=float(minimizer.__fe__[0] - minimizer.get_free_energy()) * RYDBERG,
            stress=symmetry.tensor(_reweighted_stress(loaded)),
            fc_gradient=float(minimizer.__gc__[-1]) * RYDBERG / BOHR**2,
            centroid_gradient=float(minimizer.__gw__[-1]),
            n_steps=len(minimizer.__gc__),
            converged=bool(minimizer.is_converged()),
        )


def _projector(minimizer: Any, state: SschaState, symmetry: Symmetry) -> Any:
    q = fractional_q(minimizer.dyn)

    def project(dyn_gradient: np.ndarray, centroid_gradient: np.ndarray) -> None:
        compact = symmetry.force_constants(inverse_fourier(dyn_gradient, state.supercell_matrix, q))
        dyn_gradient[:] = _exact_sum_rule(fourier(compact, state.supercell_matrix, q))
        centroid_gradient[:] = symmetry.vectors(centroid_gradient)

    return project


def _exact_sum_rule(matrices: np.ndarray) -> np.ndarray:
    """Remove from the first (Gamma) matrix what rounding leaves of the translations, as
    python-sscha does."""
    import cellconstructor as CC
    import cellconstructor.symmetries

    gamma = np.array(matrices[0].real, dtype=np.complex128)
    CC.symmetries.CustomASR(gamma)
    matrices[0] = gamma
    return matrices


def _reweighted_stress(loaded: Any) -> np.ndarray:
    """<sigma + f u / Omega> with python-sscha's weights, (3, 3) eV/A^3 in ASE's sign.

    Not ``get_stress_tensor``: that imposes the symmetry as python-sscha sees it.
    """
    weights = loaded.rho / loaded.rho.sum()
    displacements = loaded.u_disps.reshape(loaded.N, -1, 3)
    virial = (
        np.einsum("c,cai,caj->ij", weights, loaded.forces, displacements, optimize=True)
        / loaded.supercell_structure.get_volume()
    )
    return (
        np.einsum("c,cij->ij", weights, -loaded.stresses) / BOHR**3 + 0.5 * (virial + virial.T)
    ) * RYDBERG


def fractional_q(dyn: Any) -> np.ndarray:
    """(n_q, 3) q points of a ``Phonons`` object in fractions of the reciprocal vectors."""
    return np.array(dyn.q_tot) @ np.asarray(dyn.structure.unit_cell).T


def _q_grid(supercell_matrix: SupercellMatrix) -> np.ndarray:
    """(n_q, 3) fractional q points of the supercell, Gamma first.

    Not ``GetQGrid`` of cellconstructor: on a 3x3x3 grid it puts (1/3, -1/3, 0) first, taking it for
    Gamma.
    """
    q = q_points(supercell_matrix)
    return q - np.round(q - 1e-9)


def to_phonons(state: SschaState) -> Any:
    """The state as ``cellconstructor.Phonons.Phonons`` (Ry/bohr^2, masses in Rydberg units,
    coordinates in A)."""
    import cellconstructor as CC
    import cellconstructor.Phonons
    import cellconstructor.Structure

    structure = CC.Structure.Structure()
    structure.generate_from_ase_atoms(state.atoms)
    # an ase Cell instead of an array makes python-sscha's inner loops twice as slow
    structure.unit_cell = np.array(state.atoms.cell.array)
    masses = state.atoms.get_masses() * AMU_IN_RYDBERG_MASS
    structure.atoms = labels_of(state.atoms)
    structure.masses = dict(zip(structure.atoms, masses.tolist(), strict=True))
    dyn = CC.Phonons.Phonons(structure, nqirr=state.n_cells)
    dyn.q_tot = list(_q_grid(state.supercell_matrix) @ np.linalg.inv(state.atoms.cell.array).T)
    dyn.q_stars = [[q.copy()] for q in dyn.q_tot]
    matrices = (
        fourier(state.force_constants, state.supercell_matrix, fractional_q(dyn))
        * BOHR**2
        / RYDBERG
    )
    dyn.dynmats = [np.array(matrix, dtype=np.complex128) for matrix in _exact_sum_rule(matrices)]
    dyn.initialized = True
    return dyn


def labels_of(atoms: Atoms) -> list[str]:
    """Type labels as pw.x takes them: the symbols, with a number where an element has several
    masses (``H1``, ``H2``)."""
    pairs = list(zip(atoms.get_chemical_symbols(), kinds(atoms).tolist(), strict=True))
    own = {symbol: sorted({kind for name, kind in pairs if name == symbol}) for symbol, _ in pairs}
    return [
        f"{symbol}{own[symbol].index(kind) + 1}" if len(own[symbol]) > 1 else symbol
        for symbol, kind in pairs
    ]


def element_of(label: str, mass: float) -> str:
    """The element of a type label of pw.x: a symbol in any case, perhaps followed by a number, a
    letter or ``_...``; D and T are H.

    ``mass`` (amu) decides where the letters allow two (``Hs`` of 1 amu is H). Raises ``InputError``
    where they are no element.
    """
    letters = re.match(r"[A-Za-z]*", label.strip())[0]
    words = {letters[:2].capitalize(), letters[:1].upper()} - {""}
    found = {
        "H" if word in HYDROGEN else word
        for word in words
        if word in HYDROGEN or atomic_numbers.get(word, 0) > 0
    }
    if not found:
        raise InputError(
            f"the type label {label!r} names no element (labels of pw.x: H, H1, H_pbe, h, D)"
        )
    return min(
        sorted(found),
        key=lambda symbol: (
            abs(np.log(mass / atomic_masses[atomic_numbers[symbol]])),
            -len(symbol),
        ),
    )


def from_phonons(dyn: Any, template: SschaState, symmetry: Symmetry) -> SschaState:
    """The state of a ``Phonons`` object with the cell, masses and temperature of ``template``."""
    atoms = template.atoms.copy()
    atoms.positions = dyn.structure.coords
    matrices = np.array(dyn.dynmats) * RYDBERG / BOHR**2
    compact = symmetry.force_constants(
        inverse_fourier(matrices, template.supercell_matrix, fractional_q(dyn))
    )
    return replace(template, atoms=atoms, force_constants=compact)


def to_ensemble(state: SschaState, ensemble: Ensemble) -> Any:
    """Load an evaluated ensemble; energies are taken relative to their mean (python-sscha has two
    Rydbergs)."""
    import sscha.Ensemble

    ensemble = ensemble.of_the_truth("sscha.engine: python-sscha")
    loaded = sscha.Ensemble.Ensemble(to_phonons(state), T0=state.temperature)
    order = atom_order(state.supercell, loaded.supercell_structure.coords)
    _transform_gradients_fast(loaded, state.supercell_matrix, order)
    n_configs = len(ensemble.energies)
    structures = []
    for displacement in ensemble.displacements:
        structure = loaded.supercell_structure.copy()
        structure.coords = structure.coords + displacement[order]
        structures.append(structure)
    loaded.init_from_structures(structures)
    loaded.energies = (ensemble.energies - ensemble.energies.mean()) / RYDBERG
    loaded.forces[:] = ensemble.forces[:, order] / RYDBERG
    loaded.stresses[:] = -ensemble.stresses * BOHR**3 / RYDBERG
    loaded.force_computed = np.ones(n_configs, dtype=bool)
    loaded.stress_computed = np.ones(n_configs, dtype=bool)
    loaded.has_stress = True
    loaded.init()
    loaded.update_weights(loaded.dyn_0, state.temperature)
    return loaded


def _transform_gradients_fast(
    loaded: Any, supercell_matrix: SupercellMatrix, order: np.ndarray
) -> None:
    """Let the ensemble Fourier transform its gradients with two matrix products; its own double
    loop takes half of a step."""
    columns = (3 * np.argsort(order)[:, None] + np.arange(3)).ravel()
    q = fractional_q(loaded.dyn_0)

    def transform(
        gradient: np.ndarray,
        error: np.ndarray,
        structure: Any,
        return_error: bool = False,
        timer: Any = None,
    ) -> Any:
        matrices = [
            fourier(fold(matrix[np.ix_(columns, columns)], supercell_matrix), supercell_matrix, q)
            for matrix in (gradient, error)
        ]
        return tuple(matrices) if return_error else matrices[0]

    object.__setattr__(loaded, "_get_gradient_qspace", transform)


def write_dynamical_matrices(state: SschaState, prefix: Path, log: Path) -> None:
    """Write ``prefix1`` ... ``prefixN`` in Quantum ESPRESSO's format, one file per star of q points
    where possible."""
    with quiet(log):
        dyn = to_phonons(state)
        try:
            if is_diagonal(state.supercell_matrix):
                dyn.AdjustQStar()
        except (ValueError, IndexError, AssertionError):
            # cellconstructor's symmetry finder does not close these stars; one file per q point is
            # as readable
            dyn = to_phonons(state)
        dyn.nqirr = len(dyn.q_stars)
        temporary = prefix.with_name(f".{prefix.name}")
        dyn.save_qe(str(temporary))
        for index in range(1, dyn.nqirr + 1):
            os.replace(f"{temporary}{index}", f"{prefix}{index}")


def read_dynamical_matrices(prefix: str | Path, temperature: float, log: Path) -> SschaState:
    """Read ``prefix1`` ... ``prefixN`` (Quantum ESPRESSO's format); raises ``InputError`` when they
    are not there."""
    count = 0
    while Path(f"{prefix}{count + 1}").is_file():
        count += 1
    if count == 0:
        raise InputError(
            f"start: {prefix}1: no such file (give an SSCHA folder, or the prefix of dynamical"
            " matrices)"
        )
    for number in range(1, count + 1):
        text = (
            Path(f"{prefix}{number}")
            .read_text(encoding="utf-8", errors="replace")
            .split("\n", 2)[-1]
        )
        if damage := NO_NUMBER.search(text):
            raise InputError(
                f"start: {prefix}{number}: holds {damage[0].strip()!r} where a number should be;"
                " work it out again"
            )
    with quiet(log):
        import cellconstructor as CC
        import cellconstructor.Phonons

        dyn = CC.Phonons.Phonons(str(prefix), count)
    structure = dyn.structure
    masses = structure.get_masses_array() / AMU_IN_RYDBERG_MASS
    if not (masses > 0).all():
        raise InputError(f"start: {prefix}1: has masses that are not positive")
    try:
        symbols = [
            element_of(label, mass) for label, mass in zip(structure.atoms, masses, strict=True)
        ]
    except InputError as error:
        raise InputError(f"start: {prefix}1: {error}") from None
    atoms = Atoms(
        symbols, positions=structure.coords, cell=structure.unit_cell, masses=masses, pbc=True
    )
    matrices = np.array(dyn.dynmats) * RYDBERG / BOHR**2
    if (
        np.abs(matrices - matrices.conj().swapaxes(-1, -2)).max()
        > NOT_HERMITIAN * np.abs(matrices).max()
    ):
        raise InputError(
            f"start: {prefix}1, ...: the matrices are not Hermitian; a file is damaged"
        )
    supercell_matrix = commensurate(fractional_q(dyn), atoms.cell.array)
    if n_cells(supercell_matrix) != len(matrices):
        raise InputError(
            f"start: {prefix}: {len(matrices)} q points do not make a supercell {supercell_matrix}"
        )
    compact = inverse_fourier(matrices, supercell_matrix, fractional_q(dyn))
    return SschaState(atoms, supercell_matrix, compact, temperature)
