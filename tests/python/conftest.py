# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import fusestep
import support


@pytest.fixture(params=support.NAMES)
def name(request):
    """The name of a class, in torch.optim and in fusestep.optim."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Every test sees the warnings that a process shows once."""
    fusestep.optim._warn_once.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    torch.set_num_threads(2)
