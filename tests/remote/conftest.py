"""A board to log in to: a real sshd on the loopback address."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from outputs import token_pruned
from sshd import Board, Server, logged_in_from, serving


@pytest.fixture(scope="session")
def sshd_server(tmp_path_factory) -> Iterator[Server]:
    """The sshd alone; for a wider scope than a test's, with ``settings``."""
    with serving(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def sshd(sshd_server, tmp_path, monkeypatch) -> Board:
    """A board that this process may log in to: with a home, settings and known hosts of the test's own."""
    return logged_in_from(sshd_server, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A token-pruned model as ONNX, images for it, and the answers of this process."""
    return token_pruned(tmp_path_factory.mktemp("model"), 5)
