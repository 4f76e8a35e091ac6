"""Fixtures that several test files share."""

import os
import signal

import crystals
import pytest

# distributed writes to the stream it saw when it was imported, which under pytest is a closed one
# by the time it says goodbye
os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")

# a shell without job control lets what it starts in the background ignore Ctrl-C, and the tests of
# being interrupted would never end
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the machine does not lose its power while the tests run: waiting for the disk is a third of some
os.fsync = lambda descriptor: None

TOGETHER = {
    "test_exact_crystals",
    "test_finetune",
    "test_free_energy_model",
    "test_labelers",
    "test_learning",
    "test_nonanalytic",
    "test_phase_diagram",
    "test_search",
    "test_sscha_free_energy",
    "test_uncertainty",
}
"""Files whose tests share searches, runs or trainings: one process has all of one file."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A MatterSim-format model with random weights and a per-species shift of the usual size: 2
    blocks, 16 units."""
    import torch
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet

    from magus_anharmonic.potential.checkpoint import save

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = M3Gnet(num_blocks=2, units=16, device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
        module.normalizer.shift.copy_(-2.0 - torch.arange(95) / 20)
    save(module, path, species=range(1, 95))
    return path


@pytest.fixture(scope="session")
def potential(tiny_checkpoint):
    """The tiny model, loaded on the CPU."""
    from magus_anharmonic.potential import load

    return load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def h3s():
    """`crystals.h3s`."""
    return crystals.h3s
