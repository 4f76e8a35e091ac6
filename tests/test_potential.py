"""A loaded checkpoint gives MatterSim's own numbers, for any structure, and says clearly what is
wrong when it cannot."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.units import GPa
from mattersim.datasets.utils.build import build_dataloader
from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
from mattersim.forcefield.potential import Potential as StockPotential

from magus_anharmonic.errors import CheckpointError, InputError, MagusAnharmonicError
from magus_anharmonic.potential import checkpoint, load
from magus_anharmonic.potential.evaluate import Potential
from magus_anharmonic.potential.graph import build_graph
from magus_anharmonic.potential.layers import BLOCK_BYTES


def stock_results(path, structures):
    """Energies, forces and stresses (eV/A^3) of stock MatterSim."""
    stock = StockPotential.from_checkpoint(str(path), device="cpu", load_training_state=False)
    energy, forces, stress = [], [], []
    for atoms in structures:
        loader = build_dataloader([atoms.copy()], batch_size=1, only_inference=True)
        e, f, s = stock.predict_properties(loader, include_forces=True, include_stresses=True)
        energy.append(float(e[0]))
        forces.append(f[0])
        stress.append(s[0] * GPa)
    return np.array(energy), forces, np.array(stress)


def odd_structures(h3s):
    slab = fcc111("Al", (2, 1, 2), vacuum=8, periodic=True)
    water = molecule("H2O", cell=[12, 12, 12], pbc=True)
    water.center()
    rattled = h3s(3.0, 0.05).repeat((2, 1, 1))
    rattled.rattle(0.1, seed=2)
    return [
        h3s(2.8),
        bulk("Cu"),
        slab,
        water,
        rattled,
        Atoms("He", cell=[12, 12, 12], pbc=True),
        bulk("NaCl", "rocksalt", a=5.6),
    ]


def test_energy_forces_and_stress_of_a_mixed_batch_equal_stock_mattersim(
    tiny_checkpoint, potential, h3s
):
    structures = odd_structures(h3s)
    found = potential.evaluate(structures)
    energy, forces, stress = stock_results(tiny_checkpoint, structures)
    np.testing.assert_allclose(found.energy, energy, rtol=1e-6)
    np.testing.assert_allclose(found.stress, stress, atol=1e-6 * max(1.0, np.abs(stress).max()))
    for ours, theirs in zip(found.forces, forces, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def test_results_come_in_the_order_of_the_input_whatever_the_batches_are(potential, h3s):
    structures = odd_structures(h3s)
    one_by_one = Potential(potential.module, edges_per_batch=1)
    together = Potential(potential.module, edges_per_batch=10**7)
    for single, batch in zip(
        one_by_one.evaluate(structures).forces, together.evaluate(structures).forces, strict=True
    ):
        np.testing.assert_allclose(single, batch, atol=2e-6)
    assert [len(f) for f in together.evaluate(structures).forces] == [len(a) for a in structures]
    assert potential.evaluate([]).stress.shape == (0, 3, 3)


def test_the_written_out_backward_pass_equals_autograd(tiny_checkpoint, h3s, monkeypatch):
    double = load(tiny_checkpoint, device="cpu", dtype="float64")
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 64 * 2 * 16 * 8)
    graph = build_graph(odd_structures(h3s), 5.0, torch.float64)
    assert len(graph.centre) > 128
    for fast, slow in zip(double.model(graph), double.model(graph, create_graph=True), strict=True):
        np.testing.assert_allclose(fast.detach(), slow.detach(), atol=1e-12)


def test_forces_and_stress_are_derivatives_of_the_energy(tiny_checkpoint, h3s):
    double = load(tiny_checkpoint, device="cpu", dtype="float64")
    atoms = h3s(3.0, 0.1).repeat((2, 1, 1))
    atoms.rattle(0.05, seed=1)
    found = double.evaluate([atoms])
    step = 1e-4

    def energy(change):
        moved = atoms.copy()
        change(moved)
        return double.evaluate([moved]).energy[0]

    def displace(size):
        return lambda moved: moved.positions.__setitem__((1, 2), moved.positions[1, 2] + size)

    def strain(size):
        deformation = np.eye(3)
        deformation[0, 1] = deformation[1, 0] = size / 2
        return lambda moved: moved.set_cell(moved.cell.array @ deformation, scale_atoms=True)

    force = -(energy(displace(step)) - energy(displace(-step))) / (2 * step)
    shear = (energy(strain(step)) - energy(strain(-step))) / (2 * step * atoms.cell.volume)
    assert force == pytest.approx(found.forces[0][1, 2], abs=1e-7)
    assert shear == pytest.approx(found.stress[0][0, 1], abs=1e-8)


def test_rotation_translation_and_supercell_change_nothing(tiny_checkpoint, h3s):
    double = load(tiny_checkpoint, device="cpu", dtype="float64")
    atoms = h3s(2.9, 0.1)
    turned = atoms.copy()
    turned.rotate(33, (1, 2, 3), rotate_cell=True)
    turned.translate([0.3, 5.0, -7.0])
    energy = double.evaluate([atoms, turned, atoms.repeat((2, 1, 1))]).energy
    assert energy[1] == pytest.approx(energy[0], abs=1e-10)
    assert energy[2] == pytest.approx(2 * energy[0], abs=1e-10)


def test_directions_without_pbc_are_not_periodic_and_no_cell_means_no_stress(potential):
    free = molecule("H2O")
    boxed = molecule("H2O", cell=[20, 20, 20], pbc=True)
    wire = Atoms("H", cell=[1.0, 20, 20], pbc=[True, False, False])
    found = potential.evaluate([free, boxed, wire, Atoms("H", cell=[20, 20, 20], pbc=True)])
    assert found.energy[0] == pytest.approx(found.energy[1], abs=1e-5)
    assert found.energy[2] != pytest.approx(found.energy[3], abs=1e-4)
    assert np.all(found.stress[0] == 0)


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (Atoms(), "structure 1: has no atoms"),
        (Atoms("Cm", cell=[5, 5, 5], pbc=True), "structure 1: atomic number 96"),
        (
            Atoms("H2", positions=[[0, 0, 0], [0, 0, 5]], cell=[5, 5, 5], pbc=True),
            "structure 1: atoms . and . coincide",
        ),
        (Atoms("H", cell=[5, 5, 0], pbc=True), "structure 1: the cell is flat"),
        (Atoms("X", cell=[5, 5, 5], pbc=True), "structure 1: atomic number 0 is outside 1 to 94"),
        (
            Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.2]], cell=[0.4, 0.4, 0.5], pbc=True),
            r"structure 1: the cell is too small: 0.04 A\^3/atom",
        ),
        (
            Atoms("H", positions=[[np.nan, 0, 0]], cell=[5, 5, 5], pbc=True),
            "structure 1: positions or cell are not finite",
        ),
    ],
)
def test_a_structure_that_cannot_be_evaluated_is_named(potential, atoms, message):
    with pytest.raises(InputError, match=message):
        potential.evaluate([bulk("Cu"), atoms])


def test_results_that_are_not_finite_raise_with_the_index(potential):
    broken = Potential(checkpoint.read(potential.path)[0])
    broken.module.normalizer.shift[29] = float("nan")
    with pytest.raises(MagusAnharmonicError, match="structure 2"):
        broken.evaluate([bulk("Al"), bulk("Au"), bulk("Cu")])


def test_a_species_that_training_never_saw_is_warned_about_once(tmp_path, potential, caplog):
    path = tmp_path / "hs.pth"
    checkpoint.save(potential.module, path, species=[1, 16])
    narrow = load(path, device="cpu")
    assert narrow.species_seen == {1, 16}
    with caplog.at_level(logging.WARNING):
        narrow.evaluate([bulk("Cu"), bulk("Cu")])
        narrow.evaluate([bulk("Cu")])
    assert [
        record for record in caplog.messages if "Cu" in record and "H, S" in record
    ] == caplog.messages and len(caplog.messages) == 1


def test_a_saved_checkpoint_loads_in_stock_mattersim_with_the_same_weights(tmp_path, potential):
    path = tmp_path / "saved.pth"
    model = checkpoint.save(
        potential.module,
        path,
        parent_id="0" * 12,
        metrics={"loss": np.float64(1.5)},
        species={1},
        provenance={"seed": 1},
    )
    stock = StockPotential.from_checkpoint(str(path), device="cpu")
    for name, value in potential.module.state_dict().items():
        assert torch.equal(value, stock.model.state_dict()[name]), name
    assert stock.last_epoch == -1, "stock MatterSim would train no epochs"
    assert stock.ema is not None
    read = checkpoint.describe(path)
    assert (
        read == model
        and read.parent_id == "0" * 12
        and read.metrics == {"loss": 1.5}
        and read.provenance == {"seed": 1}
    )
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_stock_mattersim_saved_loads_here(tmp_path, potential):
    StockPotential(potential.module, device="cpu").save(str(tmp_path / "stock.pth"))
    loaded = load(tmp_path / "stock.pth", device="cpu")
    assert loaded.model_id == potential.model_id
    assert loaded.species_seen is None


def test_the_model_id_follows_the_weights_and_not_the_precision(tiny_checkpoint, potential):
    assert load(tiny_checkpoint, device="cpu", dtype="float64").model_id == potential.model_id
    module, _ = checkpoint.read(tiny_checkpoint)
    with torch.no_grad():
        module.final.g[0].linear.bias[0] += 1e-3
    assert checkpoint.model_id(module) != potential.model_id


def _truncate(content, path):
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[:5000])


def _change(**changes):
    return lambda content, path: torch.save({**content, **changes}, path)


def _arguments(**changes):
    return lambda content, path: torch.save(
        {**content, "model_args": {**content["model_args"], **changes}}, path
    )


def _flipped_bit(content, path):
    """In the file itself, which torch reads without a look at its checksums."""
    torch.save(content, path)
    stored, weights = (
        bytearray(path.read_bytes()),
        content["model"]["graph_conv.0.gated_mlp_edge.g.0.linear.weight"],
    )
    stored[stored.find(weights.numpy().tobytes()[:64]) + 3] ^= 1
    path.write_bytes(stored)


def _scaled_layer(content, path):
    content["model"]["final.g.0.linear.weight"] *= 1.1
    torch.save(content, path)


def _huge_weights(factor):
    """As somebody saves them on purpose, without an id."""

    def write(content, path):
        del content["model_id"]
        content["model"] = {
            name: value * factor if "graph" in name else value
            for name, value in content["model"].items()
        }
        torch.save(content, path)

    return write


def _nan_weight(content, path):
    content["model"]["final.g.0.linear.bias"][0] = float("nan")
    torch.save(content, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda content, path: None, "does not exist"),
        (lambda content, path: path.write_bytes(b""), "truncated"),
        (_truncate, "truncated"),
        (_change(model_name="graphormer"), "architecture graphormer"),
        (_change(model_args={"num_blocks": 4, "units": 16}), "does not fit"),
        (_change(model_args={"num_blocks": 2, "units": 16, "max_n": 3}), "max_n = 3"),
        (_change(model_args={"num_blocks": 2, "units": 16, "max_z": 100}), "max_z = 100"),
        (
            _change(model_args={"num_blocks": 2, "units": 16, "cutoff": float("nan")}),
            "cutoff = nan",
        ),
        (
            _change(model_args={"num_blocks": 2, "units": 16, "threebody_cutoff": 6.0}),
            "threebody_cutoff = 6.0: .* up to 5.0",
        ),
        (_nan_weight, "not finite"),
        (_flipped_bit, "those of model .*, not of model .* as it says itself"),
        (_scaled_layer, "not of model"),
        (_arguments(cutoff=5.5), "not of model"),
        (_change(model_args="abc"), "model_args = 'abc': Input should be"),
        (_change(model=None), "model = None: Input should be"),
        (_change(model_id=7), "model_id = 7: Input should be"),
        (_arguments(units=0), "units = 0: "),
        (_arguments(num_blocks=2.0), r"num_blocks = 2\.0: "),
        (_arguments(cutoff=True), "cutoff = True: "),
        (_arguments(threebody_cutoff=1e-6), r"threebody_cutoff = 1e-06: .* 1\.2"),
        (_change(species="HS"), "species = 'HS': Input should be"),
        (_change(species=[200]), r"species\.0 = 200: .* 94"),
        (_huge_weights(1e20), "give no numbers for ordinary structures"),
        (lambda content, path: torch.save([1, 2], path), "MatterSim's format"),
    ],
)
def test_a_bad_checkpoint_is_refused_with_file_and_reason(
    tmp_path, tiny_checkpoint, write, message
):
    path = tmp_path / "bad.pth"
    write(torch.load(tiny_checkpoint), path)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path, device="cpu")
    text = str(error.value)
    assert "checkpoint" in text and "bad.pth" in text and "\n" not in text


def test_weights_that_were_changed_on_purpose_load_once_the_id_is_gone(
    tmp_path, tiny_checkpoint, potential
):
    content = torch.load(tiny_checkpoint)
    content["model"]["final.g.0.linear.weight"] *= 1.1
    del content["model_id"]
    torch.save(content, tmp_path / "mine.pth")
    assert load(tmp_path / "mine.pth", device="cpu").model_id != potential.model_id


def test_another_version_of_mattersim_with_one_more_argument_calls_no_checkpoint_damaged(
    tiny_checkpoint, monkeypatch
):
    monkeypatch.setattr(M3Gnet, "get_model_args", lambda self: {**self.model_args, "new": 1})
    assert checkpoint.read(tiny_checkpoint)[1]["model_id"]


def test_a_checkpoint_of_ours_that_stock_mattersim_finetuned_loads_here(
    tmp_path, tiny_checkpoint, potential
):
    stock = StockPotential.from_checkpoint(str(tiny_checkpoint), device="cpu")
    with torch.no_grad():
        next(stock.model.parameters()).mul_(1.01)
    stock.save(str(tmp_path / "stock.pth"))
    assert load(tmp_path / "stock.pth", device="cpu").model_id != potential.model_id


@pytest.mark.parametrize(
    ("structures", "message"),
    [
        (bulk("Cu"), r"\[atoms\] instead of atoms"),
        (["Cu"], "structure 0 is of the type str, not ASE's Atoms"),
    ],
)
def test_what_is_no_list_of_structures_is_told_so(potential, structures, message):
    for action in (
        potential.evaluate,
        potential.uncertainty if potential.error_model else potential.mean_features,
    ):
        with pytest.raises(InputError, match=message):
            action(structures)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(CheckpointError, match="did you mean mattersim-v1.0.0-1M"):
        checkpoint.resolve("mattersim-v1.0.0-1MM")


def test_a_checkpoint_that_cannot_be_downloaded_tells_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint mattersim-v1.0.0-5M.pth .* by hand .*pretrained_models.*h3s-gpaw-small",
    ):
        load("MatterSim-v1.0.0-5M")
    assert not list(tmp_path.rglob("*.pth"))


def test_a_downloaded_checkpoint_is_found_by_its_name(tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.setenv("HOME", str(tmp_path))
    target = checkpoint.mattersim_folder() / "mattersim-v1.0.0-1M.pth"
    target.parent.mkdir(parents=True)
    target.write_bytes(tiny_checkpoint.read_bytes())
    assert load("mattersim-v1.0.0-1M", device="cpu").path == target


def test_a_device_that_is_not_there_and_an_unknown_precision_are_refused(tiny_checkpoint):
    with pytest.raises(InputError, match="float16"):
        load(tiny_checkpoint, device="cpu", dtype="float16")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            load(tiny_checkpoint, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_gives_the_numbers_of_the_cpu(tiny_checkpoint, potential, h3s):
    structures = odd_structures(h3s)
    ours, theirs = (
        load(tiny_checkpoint, device="cuda").evaluate(structures),
        potential.evaluate(structures),
    )
    np.testing.assert_allclose(ours.energy, theirs.energy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.concatenate(ours.forces), np.concatenate(theirs.forces), atol=1e-4
    )


def test_the_model_is_differentiable_by_its_parameters_through_the_forces(tiny_checkpoint, h3s):
    module, _ = checkpoint.read(tiny_checkpoint)
    model = Potential(module, dtype="float64").model
    atoms = h3s(2.9, 0.1)
    parameter = module.graph_conv[0].gated_mlp_edge.g[0].linear.weight

    def loss():
        return model(build_graph([atoms], 5.0, torch.float64), create_graph=True)[1].square().sum()

    (gradient,) = torch.autograd.grad(loss(), parameter)
    parameter.data[0, 0] += 1e-5
    higher = loss().item()
    parameter.data[0, 0] -= 2e-5
    lower = loss().item()
    assert (higher - lower) / 2e-5 == pytest.approx(float(gradient[0, 0]), rel=1e-4)


def test_importing_the_package_loads_no_torch_and_sets_no_thread_count():
    code = (
        "import sys, os; before = dict(os.environ); import magus_anharmonic.potential,"
        " magus_anharmonic.potential.checkpoint;assert 'torch' not in sys.modules and"
        " dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_random_models_of_the_published_shape_equal_stock_mattersim(tmp_path, h3s):
    torch.manual_seed(3)
    module = M3Gnet(num_blocks=3, units=128, device="cpu")
    checkpoint.save(module, tmp_path / "big.pth")
    structures = [h3s(3.0), h3s(2.9, 0.1)]
    found = load(tmp_path / "big.pth", device="cpu").evaluate(structures)
    energy, forces, _ = stock_results(tmp_path / "big.pth", structures)
    np.testing.assert_allclose(found.energy, energy, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.forces[1], forces[1], atol=1e-5)


def test_a_model_with_cutoffs_of_its_own_equals_stock_mattersim_with_them(tmp_path, h3s):
    torch.manual_seed(5)
    checkpoint.save(
        M3Gnet(num_blocks=2, units=16, cutoff=4.4, threebody_cutoff=3.1, device="cpu"),
        tmp_path / "short.pth",
    )
    ours = load(tmp_path / "short.pth", device="cpu")
    atoms = h3s(2.9, 0.1)
    found = ours.evaluate([atoms])
    stock = StockPotential.from_checkpoint(
        str(tmp_path / "short.pth"), device="cpu", load_training_state=False
    )
    loader = build_dataloader(
        [atoms], batch_size=1, only_inference=True, cutoff=4.4, threebody_cutoff=3.1
    )
    energy, forces, _ = stock.predict_properties(loader, include_forces=True, include_stresses=True)
    assert found.energy[0] == pytest.approx(float(energy[0]), abs=1e-5)
    np.testing.assert_allclose(found.forces[0], forces[0], atol=1e-5)


def test_directions_that_are_periodic_are_so_one_by_one(potential):
    """A sheet is the limit of a crystal whose layers are far apart."""
    sheet = Atoms("C", cell=[2.4, 2.4, 3.0], pbc=[True, True, False])
    apart = Atoms("C", cell=[2.4, 2.4, 30.0], pbc=True)
    found = potential.evaluate([sheet, apart])
    assert found.energy[0] == pytest.approx(found.energy[1], abs=1e-6)
    np.testing.assert_allclose(found.forces[0], found.forces[1], atol=1e-6)
    np.testing.assert_allclose(found.stress[0] * 3.0, found.stress[1] * 30.0, atol=1e-6)
