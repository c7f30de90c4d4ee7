"""Tests of pipelines/inference/http/protocol.py with connections that are accepted at the same moment."""

import asyncio
from unittest import mock

import pytest


def test_connections_of_one_moment_are_closed_in_their_order(monkeypatch):
    pytest.importorskip("uvicorn")
    from uvicorn import Config
    from uvicorn.server import ServerState

    from pipelines.inference.http import protocol

    monkeypatch.setattr(protocol, "MAX_WAITING", 5)
    config, state = Config(app=mock.Mock(), http=protocol.LimitedProtocol), ServerState()
    config.load()
    loop = mock.Mock(spec=asyncio.AbstractEventLoop, **{"time.return_value": 0.0})  # as in uvloop while it accepts
    transports = [mock.Mock(**{"get_extra_info.return_value": None}) for _ in range(30)]
    for transport in transports:
        protocol.LimitedProtocol(config, state, {}, _loop=loop).connection_made(transport)
    assert [transport.abort.called for transport in transports] == [True] * 25 + [False] * 5
