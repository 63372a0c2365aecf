"""Imports point one way, and `import jaxlm` stays light."""

import subprocess
import sys

import pytest

from tests.source_tree import (
    PACKAGES,
    ROOT,
    imported_modules,
    imports_of,
    module_name,
    python_files,
)

# Each layer may import itself and the lines above it; layers on one line do not know each other.
LAYERS = [
    ["pallas_kernels"],
    ["jaxlm.core"],
    ["jaxlm.models"],
    ["jaxlm.cache"],
    ["jaxlm.hf"],
    ["jaxlm.decode"],
    ["jaxlm.smc"],
    ["jaxlm.rewards"],
    ["jaxlm.search"],
    ["jaxlm.train"],
    ["jaxlm.merge", "jaxlm.skip", "jaxlm.diffusion", "jaxlm.sdg"],
    ["jaxlm.eval"],
    ["jaxlm.serve"],
    ["jaxlm.cli"],
    ["jaxlm"],  # jaxlm/__init__.py and jaxlm/__main__.py: the front door
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FRONT_DOOR = {"jaxlm", "jaxlm.__main__"}
KERNELS_MAY_IMPORT = {"pallas_kernels", "jax", "jaxlib", "numpy", *sys.stdlib_module_names}
# Loaded only by what needs them: seconds of import time, or not installed at all.
LAZY = ["torch", "transformers", "matplotlib", "orbax", "tyro", "huggingface_hub", "jinja2",
        "fastapi", "uvicorn", "prometheus_client"]


def layer_of(module: str) -> str | None:
    """The layer a module belongs to; None outside this project."""
    if module.split(".")[0] not in PACKAGES:
        return None
    matches = [name for name in RANK if name != "jaxlm" and f"{module}.".startswith(f"{name}.")]
    return matches[0] if matches else "jaxlm"


def upward_imports(module: str, imports: list[tuple[int, str]]) -> list[str]:
    """The imports that point to a higher layer, or across to a neighbour."""
    own, wrong = layer_of(module), []
    for line, target in imports:
        other = layer_of(target)
        if other is None or other == own:
            continue
        if other == "jaxlm" and target in ("jaxlm.__version__",):
            continue
        if RANK[other] >= RANK[own]:
            wrong.append(f"{module}:{line} imports {target}: {own} is below or beside {other}")
    return wrong


def test_imports_point_down():
    wrong = [
        text
        for path in python_files(*PACKAGES)
        for text in upward_imports(module_name(path), imports_of(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_layer():
    stray = [
        name
        for name in map(module_name, python_files(*PACKAGES))
        if layer_of(name) == "jaxlm" and name not in FRONT_DOOR
    ]
    assert not stray, f"add these to LAYERS in {__file__}, or move them into a layer: {stray}"


@pytest.mark.parametrize(
    ("module", "source", "is_package", "bad"),
    [
        ("jaxlm.core.tree", "def f():\n    from jaxlm.decode import loop", False, True),
        ("jaxlm.core.tree", "from ..decode import loop", False, True),
        ("jaxlm.core", "from ..models import lm", True, True),
        ("jaxlm.core", "from . import tree", True, False),
        ("jaxlm.merge.ties", "import jaxlm.skip.plan", False, True),
        ("jaxlm.models.lm", "from jaxlm import generate", False, True),
        ("pallas_kernels.x.api", "from jaxlm.core import tree", False, True),
        ("jaxlm.decode.loop", "from jaxlm.core import tree\nimport pallas_kernels", False, False),
        ("jaxlm", "from jaxlm.cli import main", True, False),
    ],
)
def test_the_check_finds_what_it_should(module, source, is_package, bad):
    assert bool(upward_imports(module, imported_modules(source, module, is_package))) == bad


def test_kernels_stand_alone():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files("pallas_kernels")
        for line, name in imports_of(path)
        if name.split(".")[0] not in KERNELS_MAY_IMPORT
    ]
    assert not wrong, "\n".join(wrong)


def test_import_jaxlm_is_light():
    code = f"import sys, jaxlm; print([name for name in {LAZY} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
