"""Risk: a first node that nobody finds is looked for until the start's limit, in silence."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from sailplan.errors import ConfigurationError
from sailplan.runtime.network import check_first_node


def test_a_first_node_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n0.invalid")
    with pytest.raises(ConfigurationError, match=r"MASTER_ADDR: found 'n0\.invalid'") as found:
        check_first_node(seconds=0.0)
    assert len(str(found.value).splitlines()) == 1


def test_a_name_server_may_answer_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n0")
    asked = []

    def late(*arguments: Any, **options: Any) -> list[Any]:
        asked.append(arguments[0])
        if len(asked) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", late)
    check_first_node(seconds=5.0)
    assert asked == ["n0", "n0"]
