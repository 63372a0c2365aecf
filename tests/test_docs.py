"""The documentation has a page for each package and names what is public."""

import re

import jaxlm
from tests.source_tree import ROOT

API = ROOT / "docs" / "api"


def test_every_package_has_a_page():
    packages = [p.parent.name for p in (ROOT / "jaxlm").glob("*/__init__.py")]
    packages += [name for name in ("pallas_kernels",) if (ROOT / name / "__init__.py").exists()]
    site = (ROOT / "mkdocs.yml").read_text()
    missing = [p for p in packages if not (API / f"{p}.md").exists() or f"api/{p}.md" not in site]
    assert not missing, f"add docs/api/NAME.md, and list it in mkdocs.yml, for {missing}"


def test_the_front_page_of_the_api_names_what_is_public():
    named = set(re.findall(r"^\| \[`(\w+)`\]", (API / "jaxlm.md").read_text(), re.M))
    assert named == set(jaxlm.__all__)
