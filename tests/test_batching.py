"""Batches, shared neighbour lists, memory that runs out, and the check of a model at its loading:
none changes a result."""

import copy
import functools
import logging
import threading
import weakref

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st
from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from magus_anharmonic.errors import InputError, MachineError, MagusAnharmonicError, is_out_of_memory
from magus_anharmonic.potential import (
    checkpoint,
    edge_basis,
    evaluate,
    far_edges,
    kernels,
    load,
    loading,
)
from magus_anharmonic.potential.evaluate import Potential
from magus_anharmonic.potential.graph import build_graph, find_topology
from magus_anharmonic.potential.layers import TorchLayers
from magus_anharmonic.potential.m3gnet import FactorisedM3GNet, Workspace
from magus_anharmonic.potential.resources import (
    MemoryModel,
    available_bytes,
    memory_model,
    run_side_by_side,
)


@pytest.fixture
def double(tiny_checkpoint):
    return Potential(checkpoint.read(tiny_checkpoint)[0], dtype="float64")


def displaced(atoms, count, size, seed=0, strain=0.0):
    """Copies with normal displacements (Angstrom), each with a random strain of its own."""
    rng = np.random.default_rng(seed)
    copies = [atoms.copy() for _ in range(count)]
    for each in copies:
        each.set_cell(
            each.cell.array @ (np.eye(3) + strain * rng.uniform(-1, 1, (3, 3))), scale_atoms=True
        )
        each.positions += rng.normal(0, size, each.positions.shape)
    return copies


def without_sharing(potential, structures, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "SHARED_FROM", 10**9)
        return potential.evaluate(structures)


def assert_same(first, second, tolerance):
    np.testing.assert_allclose(first.energy, second.energy, atol=tolerance)
    np.testing.assert_allclose(
        np.concatenate(first.forces), np.concatenate(second.forces), atol=tolerance
    )
    np.testing.assert_allclose(first.stress, second.stress, atol=tolerance)


@pytest.mark.parametrize(("size", "strain"), [(0.01, 0.0), (0.15, 0.0), (0.1, 0.03)])
def test_a_shared_list_changes_no_number_beyond_rounding(double, h3s, monkeypatch, size, strain):
    structures = displaced(h3s(3.0).repeat((2, 1, 1)), 6, size, strain=strain)
    shared = double.evaluate(structures)
    assert len(double._share(structures)[1]) == 1
    assert_same(shared, without_sharing(double, structures, monkeypatch), 1e-11)


def test_results_do_not_depend_on_what_was_computed_before(h3s, tiny_checkpoint):
    atoms = h3s(3.0).repeat((2, 1, 1))
    later = displaced(atoms, 6, 0.02, seed=1)
    fresh, used = load(tiny_checkpoint), load(tiny_checkpoint)
    used.evaluate(displaced(atoms, 5, 0.01))
    one, other = fresh.evaluate(later), used.evaluate(later)
    np.testing.assert_array_equal(one.energy, other.energy)
    np.testing.assert_array_equal(np.concatenate(one.forces), np.concatenate(other.forces))


def test_atoms_that_left_the_cell_and_molecules_without_a_cell_share_too(double, h3s, monkeypatch):
    wrapped = displaced(h3s(3.0).repeat((2, 1, 1)), 6, 0.05)
    for index, atoms in enumerate(wrapped):
        atoms.translate([0.7 * index, 0, 3.0 * index])
        atoms.wrap()
    free = displaced(Atoms("OH2", positions=[[0, 0, 0], [0.8, 0.6, 0], [-0.8, 0.6, 0]]), 5, 0.05)
    slab = displaced(
        Atoms(
            "Al2",
            positions=[[0, 0, 5], [1.4, 1.4, 7]],
            cell=[2.8, 2.8, 20],
            pbc=[True, True, False],
        ),
        5,
        0.05,
    )
    structures = [wrapped[0], free[0], slab[0], *wrapped[1:], *free[1:], *slab[1:], bulk("Cu")]
    assert_same(
        double.evaluate(structures), without_sharing(double, structures, monkeypatch), 1e-11
    )
    assert len(double._share(structures)[1]) == 3


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0.0, 0.4), strain=st.floats(0.0, 0.1))
def test_a_list_holds_every_pair_of_the_configurations_it_covers(seed, size, strain):
    rng = np.random.default_rng(seed)
    atoms = Atoms(
        "H4",
        scaled_positions=rng.random((4, 3)),
        cell=3.0 * np.eye(3) + rng.uniform(-0.8, 0.8, (3, 3)),
        pbc=True,
    )
    structures = displaced(atoms, 4, size, seed, strain)
    topology = find_topology(structures, 5.0)
    if topology is None:
        return
    try:
        plain = build_graph(structures, 5.0, torch.float64)
    except InputError:
        return
    shared = topology.graph(structures, 4.0, torch.float64, "cpu")
    assert shared.n_near == plain.n_near

    def rows(graph):
        values = np.column_stack(
            [
                graph.centre,
                graph.neighbour,
                graph.edge_structure,
                np.round(graph.vector.numpy(), 6) + 0.0,
            ]
        )
        return values[np.lexsort(values.T[::-1])]

    np.testing.assert_allclose(rows(shared), rows(plain), atol=2e-6)


def test_very_different_structures_of_one_formula_do_not_share(double, h3s, monkeypatch):
    rng = np.random.default_rng(3)
    cells = [3.0 * (np.eye(3) + rng.uniform(-0.4, 0.4, (3, 3))) for _ in range(5)]
    structures = [
        Atoms("H2", scaled_positions=[[0, 0, 0], rng.uniform(0.35, 0.65, 3)], cell=cell, pbc=True)
        for cell in cells
    ]
    assert_same(
        double.evaluate(structures), without_sharing(double, structures, monkeypatch), 1e-11
    )


def test_coincident_atoms_of_a_shared_list_are_named(potential, h3s):
    structures = displaced(h3s(3.0).repeat((2, 1, 1)), 6, 0.01)
    structures[3].positions[2] = structures[3].positions[1] + 1e-5
    with pytest.raises(InputError, match=r"structure 3: atoms . and . coincide"):
        potential.evaluate(structures)


def test_batches_obey_the_limits_of_edges_and_atoms(potential, h3s):
    small = Potential(potential.module, edges_per_batch=800)
    sizes = []
    assert small.memory.per_edge > 0, "measured before the hook"
    evaluate = small.model.evaluate
    small.model.evaluate = lambda graph: (
        sizes.append((len(graph.centre), len(graph.n_atoms))),
        evaluate(graph),
    )[1]
    structures = (
        [h3s(3.0 + 0.01 * k) for k in range(3)]
        + displaced(h3s(3.2), 5, 0.02)
        + [Atoms("H", cell=[20] * 3, pbc=True)] * 3
    )
    small.evaluate(structures)
    assert sum(count for _, count in sizes) == len(structures)
    assert all(edges <= 800 * 1.1 or count == 1 for edges, count in sizes)
    assert max(count for _, count in sizes) > 1


def fails_above(potential, limit, error):
    """Let the model raise ``error`` for graphs with more than ``limit`` structures; returns the
    sizes that were tried."""
    tried = []
    assert potential.memory.per_edge > 0, "measured before the hook"

    evaluate = potential.model.evaluate

    def refusing(graph):
        tried.append(len(graph.n_atoms))
        if tried[-1] > limit:
            raise error
        return evaluate(graph)

    potential.model.evaluate = refusing
    return tried


OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory:"
        " you tried to allocate 8 bytes"
    ),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize(
    ("error", "sharing"), [(error, i % 2 == 0) for i, error in enumerate(OUT_OF_MEMORY)]
)
def test_memory_that_runs_out_halves_the_batches_and_keeps_the_order(
    tiny_checkpoint, h3s, error, sharing, caplog
):
    structures = (
        displaced(h3s(3.0), 9, 0.02)
        if sharing
        else [h3s(2.9 + 0.03 * k).repeat((1, 1, 1 + k % 2)) for k in range(9)]
    )
    expected = Potential(checkpoint.read(tiny_checkpoint)[0]).evaluate(structures)
    narrow = Potential(checkpoint.read(tiny_checkpoint)[0])
    before = narrow.edges_per_batch
    tried = fails_above(narrow, 2, error)
    with caplog.at_level(logging.WARNING):
        assert_same(narrow.evaluate(structures), expected, 2e-6)
    assert max(tried) > 2 and narrow.edges_per_batch < before
    assert "ran out" in caplog.text


def test_other_errors_are_not_taken_for_memory(tiny_checkpoint, h3s):
    broken = Potential(checkpoint.read(tiny_checkpoint)[0])
    tried = fails_above(broken, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        broken.evaluate([h3s(3.0)] * 2)
    assert len(tried) == 1 and not is_out_of_memory(ValueError("out of memory"))


def test_a_structure_that_is_larger_than_the_memory_alone_is_named(
    tiny_checkpoint, h3s, monkeypatch
):
    narrow = Potential(checkpoint.read(tiny_checkpoint)[0])
    fails_above(narrow, 0, MemoryError())
    with pytest.raises(
        MachineError,
        match=r"structure 0 \(4 atoms, \d+ neighbour pairs\) does not fit the memory of cpu",
    ):
        narrow.evaluate([h3s(3.0), h3s(3.1)])
    small = Potential(checkpoint.read(tiny_checkpoint)[0])
    small.memory = MemoryModel(1e9, 1e9)
    monkeypatch.setattr(evaluate, "available_bytes", lambda device: 1e9)
    with pytest.raises(MagusAnharmonicError, match=r"structure 1 .*needs \d+\.\d GB"):
        small.evaluate([Atoms("H", cell=[20] * 3, pbc=True), h3s(3.0)])


def test_the_memory_model_sets_the_batch(potential, monkeypatch):
    monkeypatch.setattr(evaluate, "available_bytes", lambda device: 1e6)
    limited = Potential(potential.module)
    limited.memory = MemoryModel(1000.0, 300.0)
    assert limited.edges_per_batch * torch.get_num_threads() == pytest.approx(
        700, abs=torch.get_num_threads()
    )
    assert limited.atoms_per_batch == 2333
    assert 1e8 < available_bytes("cpu") < 1e15


class Peak(TorchDispatchMode):
    """Largest sum of the storages that live at the same time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.leave, storage._cdata, storage.nbytes())
        return result

    def leave(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("blocks", "units"), [(1, 8), (2, 64), (3, 128)])
def test_an_evaluation_takes_no_more_memory_than_the_model_of_it_says(blocks, units, dtype):
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet

    model = FactorisedM3GNet(M3Gnet(num_blocks=blocks, units=units, device="cpu").to(dtype))

    def peak(cell, count):
        """Bytes at the peak, and edges."""
        structures = [Atoms("H", cell=[cell] * 3, pbc=True)] * count
        graph = build_graph(structures, model.cutoff, dtype)
        model._workspace = Workspace()
        with Peak() as counter:
            model(graph)
        return counter.peak, len(graph.centre)

    memory = memory_model(model, dtype)
    lone = (peak(20.0, 300)[0] - peak(20.0, 100)[0]) / 200
    assert 0.3 * memory.per_atom < lone < memory.per_atom or lone < 10
    # most edges are within the three-body cutoff, as in dense hydrides
    (more, many), (less, few) = peak(1.38, 30), peak(1.38, 10)
    per_edge = (more - less - 20 * lone) / (many - few)
    # of narrow models most is the basis, of which the compiled form keeps a quarter
    assert 0.25 * memory.per_edge < per_edge < memory.per_edge


def test_a_model_that_is_evaluated_wrongly_stops_the_run(tiny_checkpoint, monkeypatch):
    potential = Potential(checkpoint.read(tiny_checkpoint)[0])
    loading.check_against_stock(potential)
    with torch.no_grad():
        other = copy.deepcopy(potential.module)
        other.graph_conv[0].gated_mlp_atom.g[1].linear.weight += 0.05
    with (
        monkeypatch.context() as patch,
        pytest.raises(MagusAnharmonicError, match="with stock MatterSim and here"),
    ):
        patch.setattr(potential, "module", other)
        loading.check_against_stock(potential)
    rightly = potential._join

    def mixed(structures, indices, neighbours):
        graph = rightly(structures, indices, neighbours)
        return (
            graph
            if len(indices) == 1
            else type(graph)(**{**graph.__dict__, "numbers": graph.numbers.flip(0)})
        )

    monkeypatch.setattr(potential, "_join", mixed)
    with pytest.raises(MagusAnharmonicError, match="alone and in a batch"):
        loading.check_against_stock(potential)


def test_a_model_is_checked_once_per_process(tiny_checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(loading, "_checked", set())
    monkeypatch.setattr(loading, "check_against_stock", calls.append)
    first = load(tiny_checkpoint, device="cpu")
    load(tiny_checkpoint, device="cpu")
    assert calls == [first]


@pytest.mark.parametrize("n_edges", [2, 103, 20_000])
def test_the_compiled_layers_are_torchs(n_edges):
    compiled = kernels.library()
    if compiled is None:
        pytest.skip("no C compiler")
    form = functools.partial(kernels.NativeLayers, functions=compiled)
    for seed in range(3):
        assert kernels.disagreement(form, seed, n_edges) < 1e-5


def test_the_compiled_edge_basis_is_torchs():
    compiled = kernels.library()
    if compiled is None:
        pytest.skip("no C compiler")
    form = functools.partial(edge_basis.NativeBasis, functions=compiled)
    for seed in range(5):
        assert edge_basis.disagreement(form, seed) < 3e-6


@pytest.mark.parametrize("units", [16, 64])
def test_interpolated_edges_are_the_models(units):
    if kernels.library() is None:
        pytest.skip("no C compiler")
    torch.manual_seed(units)
    module = M3Gnet(num_blocks=2, units=units, device="cpu")
    for species in ([1], [1, 16], [3, 8, 57, 92]):
        table = far_edges.make(module, species)
        assert far_edges.disagreement(module, table) < 3e-6
    table.coefficients[0, 0] *= 1.0001
    assert far_edges.disagreement(module, table) > far_edges._AGREEMENT


def test_edges_are_interpolated_anew_when_weights_or_species_change(h3s):
    if kernels.library() is None:
        pytest.skip("no C compiler")
    torch.manual_seed(0)
    model = FactorisedM3GNet(M3Gnet(num_blocks=2, units=16, device="cpu"))
    graph = build_graph([h3s()])
    before = model.evaluate(graph)[0]
    table = model._far.of(graph)
    assert table is model._far.of(graph)
    assert model._far.of(build_graph([bulk("Cu")])).species == {1, 16, 29}
    # as the moving average of a training writes weights: no version of a tensor tells
    for value in model.module.graph_conv[0].gated_mlp_atom.parameters():
        value.data.mul_(1.1)
    exact = model.energy(graph, graph.vector).detach()
    np.testing.assert_allclose(model.evaluate(graph)[0], exact, rtol=1e-6)
    assert not np.allclose(before, exact, rtol=1e-4)


def test_compiled_layers_give_the_same_numbers_whatever_the_number_of_threads():
    compiled = kernels.library()
    if compiled is None:
        pytest.skip("no C compiler")
    form = functools.partial(kernels.NativeLayers, functions=compiled)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(kernels.exercise(form, 20_000, 32, 0))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        # but for what torch's own products of a few rows do
        np.testing.assert_allclose(one, three, atol=1e-5 * float(one.abs().max()))


def test_wrong_compiled_layers_are_noticed():
    class Wrong(TorchLayers):
        def forward(self, layer, kept, gates, *rest):
            super().forward(layer, kept, 1.0001 * gates, *rest)

    assert kernels.disagreement(Wrong) > 1e-5


@pytest.mark.parametrize("units", [16, 24])
def test_torch_alone_gives_the_same_numbers(units, h3s, monkeypatch):
    """Units that no compiled form takes do with the compiled edge basis alone."""
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet

    with torch.random.fork_rng():
        torch.manual_seed(1)
        potential = Potential(M3Gnet(num_blocks=2, units=units, device="cpu"))
    structures = displaced(h3s(3.0), 3, 0.05)
    compiled = potential.evaluate(structures)
    monkeypatch.setattr(kernels, "_checked_functions", lambda: None)
    monkeypatch.setattr(edge_basis, "_checked_functions", lambda: None)
    assert_same(potential.evaluate(structures), compiled, 5e-6)


def test_without_a_compiler_everything_works_and_the_log_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.INFO):
        assert kernels.library.__wrapped__() is None
    assert "no C compiler" in caplog.text
    monkeypatch.setattr(kernels, "COMPILERS", ("false",))
    with pytest.raises(OSError, match="cannot compile"):
        kernels.compiled(tmp_path)
    assert not list(tmp_path.iterdir())


def test_compiled_loops_are_found_again(tmp_path):
    try:
        first = kernels.compiled(tmp_path)
    except OSError:
        pytest.skip("no C compiler")
    written = first.stat().st_mtime_ns
    assert kernels.compiled(tmp_path) == first and first.stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_take_batches_side_by_side_and_change_no_number(
    double, h3s, monkeypatch, three_threads
):
    structures = displaced(h3s(3.0).repeat((2, 2, 1)), 6, 0.05) + [
        h3s(3.0 + 0.02 * k, 0.1).repeat((2, 1, 1)) for k in range(5)
    ]
    structures += [Atoms("H", cell=[20] * 3, pbc=True)]
    threads = []
    evaluate = double.model.evaluate
    monkeypatch.setattr(
        double.model,
        "evaluate",
        lambda graph: (
            threads.append((threading.current_thread().name, torch.get_num_threads())),
            evaluate(graph),
        )[1],
    )
    together = double.evaluate(structures)
    assert {inside for _, inside in threads} == {1} and all(
        name.startswith("evaluation") for name, _ in threads
    )
    assert len(threads) >= 3 and torch.get_num_threads() == 3
    torch.set_num_threads(1)
    threads.clear()
    assert_same(together, double.evaluate(structures), 1e-11)
    assert {name for name, _ in threads} == {threading.current_thread().name}


def test_what_fails_in_a_thread_is_raised_with_its_index_and_stops_the_others(
    potential, h3s, three_threads
):
    structures = [h3s(3.0 + 0.01 * k, 0.05).repeat((2, 2, 1)) for k in range(12)]
    structures[5].positions[1] = structures[5].positions[2] + 1e-5
    with pytest.raises(InputError, match=r"structure 5: atoms . and . coincide"):
        potential.evaluate(structures)
    assert torch.get_num_threads() == 3
    done = []

    def task(number):
        if number == 1:
            raise KeyboardInterrupt
        done.append(number)

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side((functools.partial(task, number) for number in range(10_000)), 3)
    assert len(done) < 9_999


def test_evaluating_leaves_the_number_of_threads(tiny_checkpoint, h3s):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        load(tiny_checkpoint, device="cpu").evaluate([h3s(3.0)] * 5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
