"""Where cache and settings are: our own variable, then the system's, then the home; never the working folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitprune.errors import InputError
from vitprune_deploy.cache import cache_dir, config_dir

PLACES = {"CACHE": (cache_dir, ".cache"), "CONFIG": (config_dir, ".config")}


@pytest.fixture(params=PLACES)
def kind(request, monkeypatch):
    for name in (f"VITPRUNE_{request.param}_DIR", f"XDG_{request.param}_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    return request.param


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"VITPRUNE_{}_DIR": "/own", "XDG_{}_HOME": "/shared"}, "/own"),
        ({"XDG_{}_HOME": "/shared"}, "/shared/vitprune"),
        ({"XDG_{}_HOME": "relative"}, None),  # as its specification has it
        ({}, None),
        ({"VITPRUNE_{}_DIR": ""}, None),
    ],
)
def test_the_first_variable_that_is_set_decides(variables, wanted, kind, monkeypatch):
    find, in_home = PLACES[kind]
    for name, value in variables.items():
        monkeypatch.setenv(name.format(kind), value)
    assert str(find()) == (wanted or f"/home/somebody/{in_home}/vitprune")


def test_a_user_without_a_home_has_no_cache_and_is_told_where_settings_could_be(kind, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    if kind == "CACHE":
        assert cache_dir() is None
    else:
        with pytest.raises(InputError, match="no home for settings; set VITPRUNE_CONFIG_DIR"):
            config_dir()
