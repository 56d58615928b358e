from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_page_of_token_methods_is_what_its_tool_writes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.delitem(sys.modules, "token_methods", raising=False)
    import token_methods

    page = token_methods.PAGE.read_text(encoding="utf-8")
    assert without_nodes(page) == without_nodes(token_methods.page()), "run python tools/token_methods.py"


def without_nodes(page):
    """The page without the last column, which depends on the exporter's version."""
    return [line.rpartition(" | ")[0] if line.startswith("| `") else line for line in page.splitlines()]
