"""Where the cache is: our own variable, then the system's, then the home; never the working folder."""

from __future__ import annotations

import pytest

from vitprune_deploy.cache import cache_dir


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"VITPRUNE_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/shared"}, "/own"),
        ({"XDG_CACHE_HOME": "/shared"}, "/shared/vitprune"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/somebody/.cache/vitprune"),  # as its specification has it
        ({}, "/home/somebody/.cache/vitprune"),
        ({"VITPRUNE_CACHE_DIR": ""}, "/home/somebody/.cache/vitprune"),
    ],
)
def test_the_first_variable_that_is_set_decides(variables, wanted, monkeypatch):
    for name in ("VITPRUNE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_dir()) == wanted
