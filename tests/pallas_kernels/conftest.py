"""Reference vectors of the SQuat authors' code, from JAXLM_GOLDENS or ../shared/goldens."""

import os
import pathlib

import numpy as np
import pytest


def _load(name: str):
    default = pathlib.Path(__file__).resolve().parents[3] / "shared" / "goldens"
    path = pathlib.Path(os.environ.get("JAXLM_GOLDENS", default)) / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set JAXLM_GOLDENS to the folder of reference vectors")
    return np.load(path)


@pytest.fixture(scope="session")
def squat_keys():
    return _load("squat_keys.npz")


@pytest.fixture(scope="session")
def squat_attention():
    return _load("squat_attention.npz")
