"""Settings that every test shares."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def real_data() -> Path:
    """The folder of MNIST, Fashion-MNIST and CIFAR-10; the test is skipped where it is missing."""
    folder = Path(os.environ.get("PERRIN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set PERRIN_TEST_DATA)")
    return folder
