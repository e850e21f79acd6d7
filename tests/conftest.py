"""Settings that every test shares."""

import os
from pathlib import Path

import pytest
import torch

from cli_helpers import TINY, TINY_MLP, image_file, train, vector_file

torch.set_num_threads(1)


@pytest.fixture
def real_data() -> Path:
    """The folder of MNIST, Fashion-MNIST and CIFAR-10; the test is skipped where it is missing."""
    folder = Path(os.environ.get("PERRIN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set PERRIN_TEST_DATA)")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of images, 6 of 20 held out."""
    folder = tmp_path_factory.mktemp("run")
    return train(image_file(folder), folder / "run", *TINY, "--held-out", "0.3")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of vectors."""
    folder = tmp_path_factory.mktemp("vectors")
    return train(vector_file(folder), folder / "run", *TINY_MLP)
