"""The public names are frozen: a change is made in tests/data/public_api.txt too, on purpose."""

import jaxlm
from tests.source_tree import ROOT

FROZEN = ROOT / "tests" / "data" / "public_api.txt"


def test_public_names_are_frozen():
    names = FROZEN.read_text().split()
    assert names == sorted(set(names)), f"keep {FROZEN.name} sorted, each name once"
    assert sorted(jaxlm.__all__) == names


def test_public_names_resolve_and_are_listed():
    for name in jaxlm.__all__:
        assert getattr(jaxlm, name) is not None
    assert set(jaxlm.__all__) <= set(dir(jaxlm))
