"""The error tree, its codes, and how an error crosses a real gRPC call."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator

import grpc
import pytest

import ps
from ps import errors
from ps.errors import BY_CODE, PeerUnavailable, PsError, Refusal
from ps.wire.options import bind, make_server, open_channel
from ps.wire.status import STATUS, abort, error_of

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, PsError)]


def test_the_table_of_statuses_is_complete() -> None:
    assert set(STATUS) == set(ALL)
    assert grpc.StatusCode.OK not in STATUS.values()


def test_every_code_is_its_own() -> None:
    assert len({cls.code for cls in ALL}) == len(ALL)
    assert {cls.code: cls for cls in ALL} == BY_CODE
    for cls in ALL:
        assert "code" in vars(cls), f"{cls.__name__} has the code of its base"


def test_no_error_is_declared_elsewhere() -> None:
    """An error that the tables do not know would cross the wire as something else."""
    for module in pkgutil.walk_packages(ps.__path__, "ps."):
        importlib.import_module(module.name)

    def below(cls: type[PsError]) -> Iterator[type[PsError]]:
        for child in cls.__subclasses__():
            yield child
            yield from below(child)

    assert {cls for cls in below(PsError) if cls.__module__.startswith("ps.")} == set(ALL) - {PsError}


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if line.startswith("    ")]
    documented = {line.split()[0]: len(line) - len(line.lstrip()) for line in lines}
    assert set(documented) == {cls.__name__ for cls in ALL}
    for cls in ALL:
        depth = len([base for base in cls.__mro__ if issubclass(base, PsError)])
        assert documented[cls.__name__] == 2 + 2 * depth, cls.__name__


def test_a_refusal_says_whether_to_try_again() -> None:
    retry = {cls.code for cls in ALL if issubclass(cls, Refusal) and cls.retry}
    assert retry == {"FENCE_NOT_KNOWN", "STEP_NOT_OPEN", "WRONG_HASH", "NOT_SERVING"}


def test_a_message_is_one_line() -> None:
    assert PsError("two\nlines  and\tmore").message == "two lines and more"


@pytest.fixture(scope="module")
def call() -> Iterator[Callable[[str], bytes]]:
    """A real server whose method raises the error of a code, and a call of it."""

    def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
        code, _, text = request.decode().partition("|")
        if code == "BUG":
            raise ValueError(text)
        if code == "CANCELLED":
            context.abort(grpc.StatusCode.CANCELLED, text)
        abort(context, BY_CODE[code](text))
        return b""

    server = make_server(2)
    handler = grpc.unary_unary_rpc_method_handler(fail)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"Fail": handler}),))
    port = bind(server, "127.0.0.1:0")
    server.start()
    with open_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/t.T/Fail")
        yield lambda request: method(request.encode(), timeout=10.0)
    server.stop(0).wait(5.0)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_an_error_arrives_as_itself(call: Callable[[str], bytes], cls: type[PsError]) -> None:
    text = "Datei 书.txt, offset 3: not UTF-8\nand more; 100 % \u00e4"
    with pytest.raises(grpc.RpcError) as caught:
        call(f"{cls.code}|{text}")
    assert caught.value.code() is STATUS[cls]
    error = error_of(caught.value, "asking")
    assert type(error) is cls
    assert error.message == f"asking: {cls(text).message}"


def test_what_is_none_of_ours_is_a_peer_that_cannot_be_reached(call: Callable[[str], bytes]) -> None:
    for request, status in (("BUG|oops", "UNKNOWN"), ("CANCELLED|gone", "CANCELLED")):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        error = error_of(caught.value, "asking")
        assert type(error) is PeerUnavailable
        assert status in error.message
    assert type(error_of(grpc.RpcError("no call at all"), "asking")) is PeerUnavailable


def test_nobody_there() -> None:
    with open_channel("127.0.0.1:1") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/t.T/Fail")(b"", timeout=5.0)
    assert type(error_of(caught.value, "asking")) is PeerUnavailable
