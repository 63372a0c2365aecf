"""The documentation has a page for each package and names what is public."""

import re
import tomllib

import jaxlm
from tests.source_tree import ROOT

API = ROOT / "docs" / "api"


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
