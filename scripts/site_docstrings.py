"""The house's docstrings in the form that the site's parser reads: an extension of griffe.

Two forms are shorter in the source than griffe allows, and it reads both wrong: a section that
stands on its heading's line ("Raises: ConfigError for ..."), and a doctest without a heading.
"""

import re
from typing import Any

try:
    from griffe import Extension
except ModuleNotFoundError:  # the tests read `for_site` without the site's tools
    Extension = object

SAID = re.compile(r"([A-Z]\w+): (?=\S)")


def for_site(docstring: str) -> str:
    """Doctests fenced, and sections on their heading's line as paragraphs."""
    lines: list[str] = []
    said, fence = False, None
    for line in docstring.splitlines():
        text = line.lstrip()
        if fence is not None and not text:
            lines.append(fence + "```")
            fence = None
        elif fence is None and text.startswith(">>> "):
            fence = line[: len(line) - len(text)]
            lines.append(fence + "```pycon")
        elif fence is None and lines and SAID.match(line):
            said, line = True, SAID.sub(r"**\1:** ", line, count=1)
            lines += [""] if lines[-1] else []
        elif said and line != text:
            line = text
        else:
            said = False
        lines.append(line)
    return "\n".join(lines if fence is None else [*lines, fence + "```"])


class SiteDocstrings(Extension):
    """What mkdocs.yml names."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called once for each module, class, function and attribute that griffe finds."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = for_site(obj.docstring.value)
