"""The potential inside TorchSim gives the potential's own numbers."""

import sys

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential import calculator as torchsim
from magus_anharmonic.potential.calculator import torchsim_model


@pytest.fixture
def ts():
    return pytest.importorskip(
        "torch_sim", reason="TorchSim is not installed (pip install 'magus-anharmonic[torchsim]')"
    )


def test_without_torchsim_the_error_says_how_to_install_it(potential, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_sim", None)
    torchsim._model_class.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'magus-anharmonic\[torchsim\]'"):
        torchsim_model(potential)


def state_of(atoms, pbc=True):
    """The fields of a TorchSim state: cell vectors are columns."""
    return {
        "positions": torch.as_tensor(np.concatenate([a.positions for a in atoms])),
        "cell": torch.as_tensor(np.array([a.cell.array.T for a in atoms])),
        "atomic_numbers": torch.as_tensor(np.concatenate([a.numbers for a in atoms])),
        "system_idx": torch.as_tensor(np.repeat(np.arange(len(atoms)), [len(a) for a in atoms])),
        "pbc": pbc,
    }


def test_states_of_both_generations_of_torchsim_become_the_same_structures():
    slab = fcc111("Al", (1, 1, 3), vacuum=5.0)
    for pbc in (torch.tensor([True, True, False]), [True, True, False]):
        (found,) = torchsim.structures(state_of([slab], pbc))
        assert found.pbc.tolist() == [True, True, False]
        np.testing.assert_array_equal(found.cell.array, slab.cell.array)
    sheared = bulk("Fe", a=2.8)
    sheared.set_cell([[2.0, 0.3, 0.0], [0.0, 2.1, 0.4], [0.1, 0.0, 2.2]])
    found = torchsim.structures(state_of([bulk("Si"), sheared]))
    assert [len(a) for a in found] == [2, 1] and all(a.pbc.all() for a in found)
    np.testing.assert_array_equal(found[1].cell.array, sheared.cell.array)


def test_torchsim_sees_the_numbers_of_the_potential(ts, potential, h3s):
    atoms = [h3s(3.1, 0.1), bulk("Si")]
    model = torchsim_model(potential)
    found = model(ts.io.atoms_to_state(atoms, model.device, model.dtype))
    own = potential.evaluate(atoms)
    np.testing.assert_allclose(found["energy"].numpy(), own.energy, rtol=1e-7)
    np.testing.assert_allclose(found["forces"].numpy(), np.concatenate(own.forces), atol=1e-5)
    np.testing.assert_allclose(found["stress"].numpy(), own.stress, atol=1e-6)


def test_the_adapter_passes_the_check_that_torchsim_has_for_models(ts, potential):
    from torch_sim.models.interface import validate_model_outputs

    model = torchsim_model(potential)
    validate_model_outputs(model, model.device, model.dtype)


def test_torchsims_fire_goes_down_on_the_potential(ts, potential, h3s):
    model, atoms = torchsim_model(potential), h3s(3.1, 0.1)
    optimizer = getattr(ts, "frechet_cell_fire", None)
    options = {"scalar_pressure": 0.0, "optimizer": optimizer}
    if optimizer is None:
        options = {
            "optimizer": ts.Optimizer.fire,
            "init_kwargs": {"cell_filter": ts.CellFilter.frechet},
        }
    final = ts.optimize(system=[atoms], model=model, max_steps=20, **options)
    assert float(final.energy[0]) < potential.evaluate([atoms]).energy[0]
