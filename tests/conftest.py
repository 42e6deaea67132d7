"""Shared by all tests: one thread per process (the machine is small), slow tests only when asked
for.
"""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="slow; run with: pytest -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
