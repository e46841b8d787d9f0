"""gRPC between the processes of a simulation: channels, servers and calls, with its names and its errors.

A call has a connection of its own, as Windlass's streams have. What travels on it arrives in order, late, and maybe not
at all: a connection breaks, and its two ends hear so at different times, so that an old one's last words may come when
a new one is in use. What the protocol says may come twice does.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc

from protos.ps.v1 import coordinator_pb2 as pb
from ps.errors import MalformedFrame
from ps.wire import frame
from tests.simulation.scheduler import Process, Scheduler, Task

#: Messages of one direction that are on their way or unread, at most: HTTP/2's flow control.
WINDOW = 4
#: What a server has not answered after this is a lost cause to nobody but callers without a deadline.
MEDIAN_LATENCY_S = 150e-6
#: Facts that are told again whenever they may not have been heard.
_FACTS = {"prepared", "applied", "initialized", "snapshot_written", "contributed", "decision"}


@dataclass(frozen=True)
class Weather:
    """How often what goes wrong on the network; each is a probability per message."""

    #: That it is late, by at most `late_s`.
    late: float = 0.0
    late_s: float = 0.02
    #: That its connection breaks.
    breaks: float = 0.0
    #: That it comes twice, where it may.
    twice: float = 0.0


CALM = Weather()


class SimulatedRpcError(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """A call that failed, as a client sees it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(details)
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._trailing


for _name in SimulatedRpcError.__abstractmethods__:
    setattr(SimulatedRpcError, _name, lambda *_: None)
SimulatedRpcError.__abstractmethods__ = frozenset()


def _broken(details: str = "Connection reset by peer") -> SimulatedRpcError:
    return SimulatedRpcError(grpc.StatusCode.UNAVAILABLE, details)


class _Aborted(Exception):
    """A handler has ended its call with a status."""


class Pipe:
    """One direction of a connection, up to the reader's buffer."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._scheduler = network.scheduler
        self.buffer: deque[Any] = deque()
        #: Sent and not read.
        self._under_way = 0
        self._arrives_at = 0.0
        self._reader: Task | None = None
        self._writer: Task | None = None
        #: What the reader gets when the buffer is empty.
        self.end: BaseException | None = None
        self.closed = False

    def send(self, item: Any, connection: Connection) -> bool:
        """Send one message, waiting for room; False: nobody will read it."""
        while self._under_way >= WINDOW and not self.closed:
            self._writer = self._scheduler.current
            self._scheduler.block()
        if self.closed:
            return False
        self._under_way += 1
        self._network.carry(self, item, connection)
        return True

    def due(self, delay_s: float) -> float:
        """When what is sent now arrives: not before what was sent before it."""
        now = self._scheduler.now
        self._arrives_at = max(self._arrives_at, now + delay_s)
        return self._arrives_at - now

    def deliver(self, item: Any, counted: bool) -> None:
        if self.end is None:
            self.buffer.append((item, counted))
            self._wake_reader()

    def read(self, deadline: float | None = None) -> Any:
        """The next message.

        Raises:
            StopIteration, grpc.RpcError: there is none, and why.
            TimeoutError: not in time.
        """
        while not self.buffer:
            if self.end is not None:
                raise self.end
            self._reader = self._scheduler.current
            if not self._scheduler.block(None if deadline is None else deadline - self._scheduler.now):
                raise TimeoutError
        item, counted = self.buffer.popleft()
        if counted:
            self._under_way -= 1
            self._wake_writer()
        return item

    def finish(self, end: BaseException) -> None:
        """The reader gets nothing more after what is in the buffer."""
        if self.end is None:
            self.end = end
            self._wake_reader()

    def stop(self) -> None:
        """Nobody reads any more."""
        self.closed = True
        self._wake_writer()

    def _wake_reader(self) -> None:
        task, self._reader = self._reader, None
        if task is not None:
            self._scheduler.wake(task)

    def _wake_writer(self) -> None:
        task, self._writer = self._writer, None
        if task is not None:
            self._scheduler.wake(task)


class Connection:
    """One call between two processes."""

    def __init__(self, network: Network, client: Process, address: str, path: str) -> None:
        self.network = network
        self.client = client
        self.address = address
        self.path = path
        self.server: SimulatedServer | None = None
        self.up, self.down = Pipe(network), Pipe(network)
        self.is_over = False
        #: Called in the server's process when the call is over.
        self.callbacks: list[Callable[[], None]] = []
        self.context: Context | None = None

    def touches(self, process: Process) -> bool:
        return self.client is process or (self.server is not None and self.server.process is process)

    def break_(self, slack_s: float = 2e-3) -> None:
        """Both ends hear that the connection is gone, each in its time: what is under way may still arrive."""
        if self.is_over:
            return
        if self.network.rng.random() < self.network.weather.late:
            slack_s += self.network.weather.late_s
        self.is_over = True
        self.network.connections.pop(self, None)
        after, rng = self.network.scheduler.after, self.network.rng
        after(rng.random() * slack_s, self._client_hears, process=self.client)
        if self.server is not None:
            after(rng.random() * slack_s, self._server_hears, process=self.server.process)

    def cancel(self) -> None:
        """The client's end is closed: it hears nothing more, and the server soon knows."""
        if self.is_over:
            return
        self.is_over = True
        self.network.connections.pop(self, None)
        self._client_hears(SimulatedRpcError(grpc.StatusCode.CANCELLED, "Locally cancelled by application!"))
        if self.server is not None:
            late_s = self.network.rng.random() * 2e-3
            self.network.scheduler.after(late_s, self._server_hears, process=self.server.process)

    def complete(self) -> None:
        """The handler has returned and its status is on its way."""
        self.is_over = True
        self.network.connections.pop(self, None)
        self.up.stop()
        self._run_callbacks()

    def _client_hears(self, error: SimulatedRpcError | None = None) -> None:
        self.down.finish(error or _broken())
        self.up.stop()

    def _server_hears(self) -> None:
        self.up.finish(_broken())
        self.down.stop()
        self._run_callbacks()

    def _run_callbacks(self) -> None:
        callbacks, self.callbacks = self.callbacks, []
        if self.context is not None:
            self.context.is_over = True
        server = self.server
        if callbacks and server is not None and server.process.alive:
            self.network.scheduler.spawn(server.process, "over", lambda: [call() for call in callbacks])


class Network:
    """Who can reach whom, and how long it takes."""

    def __init__(self, scheduler: Scheduler, rng: random.Random, weather: Weather = CALM) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.weather = weather
        self.servers: dict[str, SimulatedServer] = {}
        #: In the order in which they were made: a set would have that of their addresses in memory.
        self.connections: dict[Connection, None] = {}
        #: Pairs of processes that do not hear of each other, and until when.
        self._apart: dict[frozenset[str], tuple[float, bool]] = {}
        self._ports = 20_000
        self.delivered = 0
        self.happened: Counter[str] = Counter()
        #: Told in words of each message that arrives; None: nobody wants to know.
        self.note: Callable[[str], None] | None = None
        #: Called after each message has arrived.
        self.on_message: Callable[[], None] = lambda: None

    # -- What the modules of Windlass see of it ---------------------------------------------------

    def module(self) -> SimpleNamespace:
        """What stands for `grpc` where channels and servers are made."""
        return SimpleNamespace(
            insecure_channel=lambda address, **_: SimulatedChannel(self, address),
            server=lambda *_, **__: SimulatedServer(self),
            Channel=object,
            Server=object,
        )

    def port(self) -> int:
        self._ports += 1
        return self._ports

    # -- Disturbances ---------------------------------------------------------------------------

    def part(self, one: Process, other: Process, seconds: float, cut: bool) -> None:
        """Nothing passes between two processes for so long; what is under way waits, or is lost with its connection."""
        pair = frozenset((one.name, other.name))
        self._apart[pair] = (self.scheduler.now + seconds, cut)
        if cut:
            for connection in self._between(pair):
                connection.break_(slack_s=seconds)

    def break_some(self, process: Process) -> None:
        """One connection of a process breaks."""
        mine = [connection for connection in self.connections if connection.touches(process)]
        if mine:
            self.rng.choice(mine).break_()

    def leave(self, process: Process) -> None:
        """A process is gone: so are its ports and its connections."""
        self.servers = {address: server for address, server in self.servers.items() if server.process is not process}
        for connection in list(self.connections):
            if connection.touches(process):
                connection.break_()

    def _between(self, pair: frozenset[str]) -> list[Connection]:
        return [
            c
            for c in self.connections
            if c.server is not None and frozenset((c.client.name, c.server.process.name)) == pair
        ]

    def _parted(self, connection: Connection) -> tuple[float, bool]:
        """How long a connection's ends still do not hear of each other, and whether a new one fails at once."""
        server = connection.server
        if not self._apart or server is None:
            return 0.0, False
        until, cut = self._apart.get(frozenset((connection.client.name, server.process.name)), (0.0, False))
        return max(0.0, until - self.scheduler.now), cut

    # -- Carrying -------------------------------------------------------------------------------

    def latency(self) -> float:
        weather = self.weather
        seconds = MEDIAN_LATENCY_S * (0.5 + self.rng.random())
        if weather.late and self.rng.random() < weather.late:
            self.happened["late"] += 1
            seconds += self.rng.random() * weather.late_s
        return seconds

    def carry(self, pipe: Pipe, item: Any, connection: Connection) -> None:
        weather = self.weather
        if weather.breaks and self.rng.random() < weather.breaks:
            self.happened["broken"] += 1
            connection.break_()
        delay_s = pipe.due(self.latency() + self._parted(connection)[0])
        self.scheduler.after(delay_s, self._arrive, pipe, item, connection, True)
        if (
            weather.twice
            and self.rng.random() < weather.twice
            and _may_come_twice(connection.path, item, pipe is connection.up)
        ):
            self.happened["twice"] += 1
            later_s = delay_s + self.rng.random() * weather.late_s
            self.scheduler.after(later_s, self._arrive, pipe, item, connection, False)

    def _arrive(self, pipe: Pipe, item: Any, connection: Connection, counted: bool) -> None:
        self.delivered += 1
        if self.note is not None:
            again = "" if counted else ", again"
            self.note(f"message: {_describe(connection, item, pipe is connection.up)}{again}")
        pipe.deliver(item, counted)
        self.on_message()

    def dial(self, connection: Connection) -> None:
        """A client's first message is on its way."""
        self.connections[connection] = None
        self.scheduler.after(self.latency(), self._accept, connection)

    def _accept(self, connection: Connection) -> None:
        server = self.servers.get(connection.address)
        if connection.is_over:
            return
        if server is None or not server.process.alive:
            connection.is_over = True
            self.connections.pop(connection, None)
            refused = _broken("failed to connect to all addresses: Connection refused")
            self.scheduler.after(self.latency(), connection._client_hears, refused, process=connection.client)
            return
        connection.server = server
        seconds, cut = self._parted(connection)
        if seconds and cut:
            connection.server = None
            connection.break_()
        elif seconds:
            connection.server = None
            self.scheduler.after(seconds, self._accept, connection)
        else:
            server.accept(connection)


def _may_come_twice(path: str, item: Any, up: bool) -> bool:
    """Whether the protocol says that a message may: pushes, facts, decisions."""
    if not isinstance(item, bytes):
        return False
    if path.endswith("/Exchange") and up:
        try:
            return frame.decode(item)[0].get("kind") == "push"
        except MalformedFrame:
            return False
    if path.endswith("/Session"):
        message = pb.SessionRequest if up else pb.SessionResponse
        return message.FromString(item).WhichOneof("event") in _FACTS
    return False


def _describe(connection: Connection, item: Any, up: bool) -> str:
    """Who says what to whom."""
    method = connection.path.rpartition("/")[2]
    server = connection.server.process.name if connection.server is not None else connection.address
    client = connection.client.name
    said = method
    if isinstance(item, bytes) and method == "Exchange":
        fields = frame.decode(item)[0]
        shown = ("term", "epoch", "version", "step", "applied", "contribution", "chunk", "code")
        said = " ".join([str(fields["kind"]), *(f"{name}={fields[name]}" for name in shown if name in fields)])
    elif isinstance(item, bytes) and method == "Session":
        message = (pb.SessionRequest if up else pb.SessionResponse).FromString(item)
        said = message.WhichOneof("event") or "accepted"
    elif isinstance(item, BaseException):
        said = f"{method} is over"
    return f"{client} -> {server}: {said}" if up else f"{server} -> {client}: {said}"


class SimulatedChannel:
    """`grpc.Channel` to one address."""

    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address
        self._calls: list[StreamCall] = []

    def __enter__(self) -> SimulatedChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for call in self._calls:
            call.cancel()
        self._calls.clear()

    def unary_unary(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None = None) -> Any:
            started = StreamCall(self._network, self._address, path, response_deserializer, timeout)
            started.send_one(_through(request_serializer, request))
            try:
                return next(started)
            finally:
                started.cancel()

        return call

    def unary_stream(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None = None) -> StreamCall:
            started = StreamCall(self._network, self._address, path, response_deserializer, timeout)
            started.send_one(_through(request_serializer, request))
            self._calls.append(started)
            return started

        return call

    def stream_stream(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Any]:
        def call(requests: Iterator[Any], timeout: float | None = None) -> StreamCall:
            started = StreamCall(self._network, self._address, path, response_deserializer, timeout)
            started.send_all(requests, request_serializer)
            self._calls.append(started)
            return started

        return call


def _through(codec: Any, value: Any) -> Any:
    return codec(value) if codec is not None else value


class StreamCall:
    """The client's side of one call."""

    def __init__(self, network: Network, address: str, path: str, deserializer: Any, timeout: float | None) -> None:
        scheduler = network.scheduler
        assert scheduler.current is not None, "only threads call"
        self._scheduler = scheduler
        self._deserializer = deserializer
        self._deadline = None if timeout is None else scheduler.now + timeout
        self._connection = Connection(network, scheduler.current.process, address, path)
        network.dial(self._connection)

    def send_one(self, request: Any) -> None:
        self._connection.up.send(request, self._connection)
        self._half_close()

    def send_all(self, requests: Iterator[Any], serializer: Any) -> None:
        def pump() -> None:
            for request in requests:
                if not self._connection.up.send(_through(serializer, request), self._connection):
                    return
            self._half_close()

        self._scheduler.spawn(self._connection.client, "call", pump)

    def _half_close(self) -> None:
        up = self._connection.up
        self._scheduler.after(up.due(0.0), up.finish, StopIteration())

    def __iter__(self) -> StreamCall:
        return self

    def __next__(self) -> Any:
        try:
            item = self._connection.down.read(self._deadline)
        except TimeoutError:
            self.cancel()
            raise SimulatedRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
        if isinstance(item, BaseException):
            self._connection.down.finish(item)
            raise item
        return _through(self._deserializer, item)

    def cancel(self) -> None:
        self._connection.cancel()


class Context:
    """`grpc.ServicerContext`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._trailing: tuple[tuple[str, str], ...] = ()
        self.status: SimulatedRpcError | None = None
        self.is_over = False

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if self.is_over:
            return False
        self._connection.callbacks.append(callback)
        return True

    def set_trailing_metadata(self, trailing: tuple[tuple[str, str], ...]) -> None:
        self._trailing = trailing

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.status = SimulatedRpcError(code, details, self._trailing)
        raise _Aborted

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return self._connection.client.name


class SimulatedServer:
    """`grpc.Server` of the process that makes it."""

    def __init__(self, network: Network) -> None:
        task = network.scheduler.current
        assert task is not None, "servers are made by processes"
        self._network = network
        self.process = task.process
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._address = ""
        #: Connections that came before `start`; None: it is behind.
        self._backlog: list[Connection] | None = []

    def add_insecure_port(self, listen: str) -> int:
        host, _, port = listen.rpartition(":")
        number = int(port) or self._network.port()
        self._address = f"{host}:{number}"
        if self._address in self._network.servers:
            raise RuntimeError("Address already in use")
        self._network.servers[self._address] = self
        return number

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, _service: str, _handlers: dict[str, Any]) -> None:
        pass

    def start(self) -> None:
        backlog, self._backlog = self._backlog or [], None
        for connection in backlog:
            self.accept(connection)

    def stop(self, grace: float | None) -> Any:
        del grace
        self._network.servers.pop(self._address, None)
        for connection in list(self._network.connections):
            if connection.server is self:
                connection.break_()
        return SimpleNamespace(wait=lambda _timeout=None: None)

    def accept(self, connection: Connection) -> None:
        if self._backlog is not None:
            self._backlog.append(connection)
            return
        self._network.scheduler.spawn(self.process, f"rpc {connection.path}", self._serve, connection)

    def _serve(self, connection: Connection) -> None:
        context = connection.context = Context(connection)
        details = SimpleNamespace(method=connection.path, invocation_metadata=())
        handler = next(h for h in (handler.service(details) for handler in self._handlers) if h is not None)
        requests = _Requests(connection.up, handler.request_deserializer)
        status: BaseException = StopIteration()
        try:
            if handler.stream_stream is not None:
                self._answer(connection, handler, handler.stream_stream(requests, context))
            elif handler.unary_stream is not None:
                self._answer(connection, handler, handler.unary_stream(next(requests), context))
            else:
                answer = handler.unary_unary(next(requests), context)
                connection.down.send(_through(handler.response_serializer, answer), connection)
        except _Aborted:
            assert context.status is not None
            status = context.status
        except grpc.RpcError:
            pass
        connection.down.send(status, connection)
        connection.complete()

    def _answer(self, connection: Connection, handler: Any, answers: Iterator[Any]) -> None:
        for answer in answers:
            if not connection.down.send(_through(handler.response_serializer, answer), connection):
                break
        close = getattr(answers, "close", None)
        if close is not None:
            close()


class _Requests:
    """What a handler gets of a call, one after the other."""

    def __init__(self, pipe: Pipe, deserializer: Any) -> None:
        self._pipe = pipe
        self._deserializer = deserializer

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> Any:
        return _through(self._deserializer, self._pipe.read())
