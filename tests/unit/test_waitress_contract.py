"""What the worker's HTTP server leans on inside waitress: fails loudly when a release moves it."""

from __future__ import annotations

import inspect

import pytest
from waitress import adjustments, channel, parser, server, task, utilities, wasyncore

from tink_rl.worker import http_server


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("cls", "name", "expected"),
    [
        (parser.HTTPRequestParser, "parse_header", ["self", "header_plus"]),
        (task.ErrorTask, "execute", ["self"]),
        (task.ErrorTask, "write", ["self", "data"]),
        (task.ErrorTask, "set_close_on_finish", ["self"]),
        (channel.HTTPChannel, "received", ["self", "data"]),
        (channel.HTTPChannel, "readable", ["self"]),
        (channel.HTTPChannel, "handle_write", ["self"]),
        (channel.HTTPChannel, "handle_close", ["self"]),
        (server.TcpWSGIServer, "maintenance", ["self", "now"]),
        (server.TcpWSGIServer, "add_task", ["self", "task"]),
        (server.TcpWSGIServer, "run", ["self"]),
        (task.ThreadedTaskDispatcher, "set_thread_count", ["self", "count"]),
        (utilities.Error, "__init__", ["self", "body"]),
        (wasyncore, "close_all", ["map", "ignore_all"]),
    ],
)
def test_methods_that_are_called_or_replaced_are_where_they_were(cls, name, expected):
    assert parameters(getattr(cls, name)) == expected


def test_server_is_made_as_it_was():
    wanted = {"application", "map", "_sock", "dispatcher", "adj", "sockinfo", "bind_socket"}
    assert wanted <= set(parameters(server.BaseWSGIServer.__init__))
    assert {"cancel_pending", "timeout"} <= set(parameters(task.ThreadedTaskDispatcher.shutdown))
    settings = inspect.getsource(http_server._adjustments)
    known = {name for name, _ in adjustments.Adjustments._params}
    asked = [line.strip().partition("=") for line in settings.splitlines() if "=" in line]
    assert {name for name, mark, _ in asked if mark and name.isidentifier()} <= known


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (channel.HTTPChannel, ["parser_class", "error_task_class", "request", "requests"]),
        (channel.HTTPChannel, ["will_close", "close_when_flushed", "last_activity"]),
        (channel.HTTPChannel, ["requests_lock", "total_outbufs_len", "server", "socket"]),
        (parser.HTTPRequestParser, ["headers", "headers_finished", "error"]),
        (task.ErrorTask, ["response_headers", "content_length", "status"]),
        (server.TcpWSGIServer, ["channel_class", "active_channels", "trigger"]),
    ],
)
def test_attributes_that_are_read_or_set_are_its_own(cls, names):
    source = "".join(
        inspect.getsource(base) for base in cls.__mro__ if base.__module__.startswith("waitress.")
    )
    for name in names:
        assert hasattr(cls, name) or f"self.{name} = " in source, name


def test_answers_are_made_where_ours_takes_their_place():
    assert "self.parser_class(self.adj)" in inspect.getsource(channel.HTTPChannel)
    assert "self.error_task_class(self, request)" in inspect.getsource(channel.HTTPChannel.service)
    assert "self.channel_class(" in inspect.getsource(server.BaseWSGIServer.handle_accept)
    assert "self.maintenance(now)" in inspect.getsource(server.BaseWSGIServer.readable)
    assert "pull_trigger" in dir(server.trigger.trigger)
    wsgi = inspect.getsource(task)
    assert '"waitress.client_disconnected"' in wsgi  # by which a client that left is noticed
