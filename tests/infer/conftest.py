"""What the tests of captioning share."""

from pathlib import Path

import pytest
from tiny_model import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return write_model(tmp_path_factory.mktemp("models") / "model")
