"""What the server's tests share."""

import pytest

from jaxlm.hf.bundle import load
from tests.tiny import write_folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A random model in a folder, loaded; a module may have one of its own."""
    return load(write_folder(tmp_path_factory.mktemp("served") / "model"))
