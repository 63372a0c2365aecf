"""Reference vectors of the SQuat authors' code: all of them, or the part committed here."""

import numpy as np
import pytest


def _load(goldens: str, request):
    """The whole file if the folder of reference vectors is there, else the committed part."""
    try:
        folder = request.getfixturevalue("goldens_dir")
    except pytest.skip.Exception:
        folder = request.getfixturevalue("golden_subset")
    return np.load(folder / goldens)


@pytest.fixture(scope="session")
def squat_keys(request):
    return _load("squat_keys.npz", request)


@pytest.fixture(scope="session")
def squat_attention(request):
    return _load("squat_attention.npz", request)


@pytest.fixture(autouse=True)
def _skip_absent_case(request):
    """A case that only the full folder has is skipped, by name, without it."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    for name in ("squat_keys", "squat_attention"):
        if case and name in request.fixturenames:
            held = {key.split("/")[0] for key in request.getfixturevalue(name).files}
            if case not in held:
                pytest.skip(f"case {case} is not among the committed vectors: set JAXLM_GOLDENS")
