# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
import gc
import os
import zlib

import pytest
import torch

import device  # before fusestep: it may put another extension in place
import fusestep
import support


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip("takes minutes: -m slow"))
        if device.KIND == "cpu" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip("needs a CUDA device: FUSESTEP_TEST_DEVICE is cpu"))
        for marker in item.iter_markers("only_on"):
            if device.KIND not in marker.args:
                item.add_marker(pytest.mark.skip(marker.kwargs["reason"]))


@pytest.fixture(params=support.NAMES)
def name(request):
    """The name of a class, in torch.optim and in fusestep.optim."""
    return request.param


@pytest.fixture
def cupy(monkeypatch):
    if device.SIMULATED:
        import simulated_cupy

        return simulated_cupy.install(monkeypatch)
    return pytest.importorskip("cupy")


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Every test sees the warnings that a process shows once."""
    fusestep.optim._warn_once.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def default_device(request, monkeypatch):
    """Tests that are about the CPU make their tensors there."""
    if device.KIND != "cuda" or not request.node.get_closest_marker("on_cpu"):
        yield
        return
    monkeypatch.setattr(device, "DEFAULT", torch.device("cpu"))
    with torch.device("cpu"):
        yield


if device.SIMULATED:

    @pytest.fixture(autouse=True)
    def simulated_devices(request, monkeypatch):
        """An order of events of its own for each test, which fails of what no correct program does."""
        seed = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("FUSESTEP_SIM_SEED", "1"))
        print(f"simulated CUDA: seed {seed}")
        monkeypatch.setattr(fusestep.optim, "_complete", device.place_state(fusestep.optim._complete))
        if device.sim.live():
            gc.collect()
        device.start_simulation(seed)
        yield
        device.sim.wait_for_all()
        violations = device.sim.take_violations()
        assert not violations, "\n".join(violations)
