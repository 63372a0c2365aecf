"""The documentation has a page for each package and names what is public."""

import ast
import re
import tomllib

import jaxlm
from scripts.site_docstrings import for_site
from tests.source_tree import PACKAGES, ROOT, python_files

API = ROOT / "docs" / "api"
FENCE = re.compile(r" *```(\w*|\{[^{}]+\})")  # another would not open a block, but its end would
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def test_every_package_has_a_page():
    packages = [p.parent.name for p in (ROOT / "jaxlm").glob("*/__init__.py")]
    packages += [name for name in ("pallas_kernels",) if (ROOT / name / "__init__.py").exists()]
    site = (ROOT / "mkdocs.yml").read_text()
    missing = [p for p in packages if not (API / f"{p}.md").exists() or f"api/{p}.md" not in site]
    assert not missing, f"add docs/api/NAME.md, and list it in mkdocs.yml, for {missing}"


def test_the_front_page_lists_the_site():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\nvalidation:")[0]
    pages = set(re.findall(r": (\S+\.md)", nav)) - {"index.md"}
    linked = set(re.findall(r"\]\(([\w/]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    files = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 10 and linked == pages == files - {"index.md"}


def test_the_front_page_names_the_extras():
    page = (ROOT / "docs" / "index.md").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    missing = [name for name in extras["optional-dependencies"]
               if f"`{name}`" not in page and f'".[{name}]"' not in page]
    assert not missing


def test_the_front_page_of_the_api_names_what_is_public():
    named = set(re.findall(r"^\| \[`(\w+)`\]", (API / "jaxlm.md").read_text(), re.M))
    assert named == set(jaxlm.__all__)


def test_fences_open_on_the_site():
    lines = [(path.name, line) for path in (ROOT / "docs").rglob("*.md")
             for line in path.read_text().splitlines() if line.lstrip().startswith("```")]
    assert len(lines) > 50 and [line for line in lines if not FENCE.fullmatch(line[1])] == []
    assert not FENCE.fullmatch("```python no-run")


def misread(docstring: str) -> list[str]:
    """Lines that the site would take for something else: they need what `for_site` does, or a
    colon."""
    wrong, fenced, heading, indent = [], False, "", None
    for line in docstring.splitlines():
        text = line.lstrip()
        deep = len(line) - len(text)
        fenced ^= text.startswith("```")
        if fenced or not text:
            continue
        if not deep:
            heading, indent = line, None
            continue
        indent = deep if indent is None else indent
        items = heading in ("Args:", "Attributes:", "Raises:")
        said = re.match(r"[A-Z]\w+: ", heading) and not docstring.startswith(heading)
        if text.startswith(">>> ") or said or (items and deep == indent and ": " not in text):
            wrong.append(line)
    return wrong


def test_docstrings_are_read_by_the_site():
    texts = [(f"{path.name}: {getattr(node, 'name', 'module')}", text)
             for path in python_files(*PACKAGES) for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node))]
    wrong = {name: bad for name, text in texts if (bad := misread(for_site(text)))}
    assert len(texts) > 1000 and not wrong, wrong
    assert any(misread(text) for _, text in texts)  # as they stand in the source
    assert misread("A.\n\nArgs:\n  a: one\n    more\n  two") == ["  two"]


def test_docstrings_for_the_site():
    text = "Sum: 1.\n\nArgs: a, the\n  one.\nRaises: E.\n\nExample:\n  >>> 1 + 1\n  2\n\n>>> 3\n3"
    assert for_site(text) == (
        "Sum: 1.\n\n**Args:** a, the\none.\n\n**Raises:** E.\n\n"
        "Example:\n  ```pycon\n  >>> 1 + 1\n  2\n  ```\n\n```pycon\n>>> 3\n3\n```")
