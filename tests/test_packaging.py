"""What the package asks of a machine, and that its versions agree."""

import ast
import re
import sys
import tomllib

import pytest

import jaxlm
from tests.source_tree import PACKAGES, ROOT, imports_of, python_files

TEXT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]
MAX_BASE = 12
ACCELERATOR = re.compile(r"cuda|rocm|tpu|nvidia|torch|triton|tensorflow", re.I)
IMPORT_NAME = {"orbax-checkpoint": "orbax", "math-verify": "math_verify", "pyyaml": "yaml"}
# Come with a base dependency, of which they are part.
PART_OF_ANOTHER = {"jaxlib": "jax", "ml_dtypes": "jax"}


def requirement_name(requirement: str) -> str:
    """The distribution's name without extras and bounds."""
    return re.match(r"[A-Za-z0-9._-]+", requirement).group()


def base_lines() -> list[str]:
    """The source lines of the base dependencies, comments included."""
    block = re.search(r"^dependencies = \[\n(.*?)^\]", TEXT, re.S | re.M).group(1)
    return [line.strip() for line in block.splitlines() if line.strip()]


def import_names(requirements: list[str]) -> set[str]:
    """What the requirements are imported as."""
    names = map(requirement_name, requirements)
    return {IMPORT_NAME.get(name, name.replace("-", "_")) for name in names}


def test_few_base_dependencies_each_with_its_reason():
    assert len(PROJECT["dependencies"]) <= MAX_BASE
    lines = base_lines()
    assert len(lines) == len(PROJECT["dependencies"]), "one dependency a line"
    bare = [line for line in lines if not re.search(r"#\s*\w+.{8,}", line)]
    assert not bare, f"say why in a comment: {bare}"


def test_no_accelerator_in_base():
    wrong = [name for name in PROJECT["dependencies"] if ACCELERATOR.search(name)]
    assert not wrong, f"belongs into an extra: {wrong}"


def test_lower_bounds_only():
    wrong = [name for name in PROJECT["dependencies"] if re.search(r"<|==|~=", name)]
    assert not wrong, f"an upper bound keeps people from installing: {wrong}"
    assert all(">=" in name for name in PROJECT["dependencies"])


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_accelerator_extras(extra):
    assert [requirement_name(r) for r in PROJECT["optional-dependencies"][extra]] == ["jax"]


SERVE = ROOT / "jaxlm" / "serve"  # its extra's own; `jaxlm.cli.serve` imports it when called


def test_what_is_imported_is_declared():
    base = import_names(PROJECT["dependencies"]) | set(PART_OF_ANOTHER)
    extras = import_names([r for rs in PROJECT["optional-dependencies"].values() for r in rs])
    extras |= {"pydantic", "starlette"}  # fastapi's own
    known = set(sys.stdlib_module_names) | set(PACKAGES) | base
    wrong = []
    for path in python_files(*PACKAGES):
        at_import = module_level_imports(path.read_text())
        for line, name in imports_of(path):
            root = name.split(".")[0]
            lazily = root in extras and (line not in at_import or path.is_relative_to(SERVE))
            if root not in known and not lazily:
                wrong.append(f"{path.relative_to(ROOT)}:{line} {root}")
    assert not wrong, f"not a base dependency, nor an extra's that is imported lazily: {wrong}"


def module_level_imports(source: str) -> set[int]:
    """The lines of the imports that run when the module is imported."""
    body = ast.parse(source).body
    return {node.lineno for node in body if isinstance(node, ast.Import | ast.ImportFrom)}


def test_versions_agree():
    version = PROJECT["version"]
    assert jaxlm.__version__ == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    entry = (ROOT / "CHANGELOG.md").read_text().split(f"## [{version}]")[1].splitlines()[0]
    dated = "date-released:" in (ROOT / "CITATION.cff").read_text()
    assert dated is ("unreleased" not in entry)


def test_typed_and_licensed():
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    assert PROJECT["license"] == "Apache-2.0"


def test_install_advice_names_what_can_be_installed():
    """jaxlm is installed from a checkout or a wheel: `pip install jaxlm[...]` names nothing."""
    wrong = re.compile(r"""pip install ["']?jaxlm\b""")
    assert wrong.search("pip install 'jaxlm[cuda13]'")
    texts = [*python_files(*PACKAGES), *(ROOT / "experiments").glob("*.py"), ROOT / "README.md",
             *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert [str(path) for path in texts if wrong.search(path.read_text())] == []
