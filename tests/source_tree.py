"""What the tests of the source tree share: the files, and what each of them imports."""

import ast
import math
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxlm", "pallas_kernels")


def python_files(*folders: str) -> list[Path]:
    """Every Python file under the folders, in order."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path, root: Path = ROOT) -> str:
    """The dotted name that a file is imported by."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute module) of every import anywhere in a source, functions included.

    `from jaxlm import hf` counts as `jaxlm.hf`; a relative import is resolved against `module`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")
                keep = len(parent) - node.level + int(is_package)
                base = ".".join([*parent[:keep], *([base] if base else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def imports_of(path: Path) -> list[tuple[int, str]]:
    """`imported_modules` of a file of this tree."""
    return imported_modules(path.read_text(), module_name(path), path.name == "__init__.py")


def documented_cases(module: dict[str, Any]) -> tuple[int, int]:
    """The generated cases that a test file's docstring states (`1,000 cases: ...`), and their true
    number: hypothesis' examples times the values they are parametrised by."""
    stated = int(re.search(r"([\d,]+) cases: ", module["__doc__"])[1].replace(",", ""))
    count = 0
    for name, value in module.items():
        own = getattr(value, "_hypothesis_internal_use_settings", None)
        if name.startswith("test_") and own is not None:
            marks = [m for m in getattr(value, "pytestmark", []) if m.name == "parametrize"]
            count += own.max_examples * math.prod(len(list(mark.args[1])) for mark in marks)
    return stated, count
