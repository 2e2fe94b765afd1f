"""Start the server, serve the model, and shut down."""

import argparse
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any, NoReturn

from outlier_mlx.engine.generate import Options
from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.access import Access, Refused, host_name, is_address
from outlier_mlx.serve.http import Service
from outlier_mlx.serve.mlxlm_server import Generator, Handler, Load, OneModel
from outlier_mlx.terminal import working

# Time limit for replies that are still being generated when the server shuts down.
SHUTDOWN_SECONDS = 3.0
ANY_HOST = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class ServeOptions:
    """Options of the server. Those without a description here are options of `mlx_lm.server`.

    Attributes:
        host: address or name to bind.
        port: port to bind; 0 picks a free port.
        api_key: the key that requests must send; required unless the host is a loopback address.
        allow_origins: allowed web origins, such as "https://chat.example"; "*" allows any.
        allow_hosts: allowed Host names besides `host`, "localhost" and IP addresses.
        max_tokens: largest number of tokens in a response, and the default for requests that set
            none.
        max_body: largest size of a request body in bytes.
        max_context: largest number of tokens in prompt and response together; None: the model's
            context length.
        max_clients: connections at a time; further ones get status 503.

    Raises:
        OutlierError: an option has a value that is not allowed.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    max_tokens: int = 4096
    max_body: int = 4_000_000
    max_context: int | None = None
    max_clients: int = 64
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    prefill_step_size: int = 2048
    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    prompt_cache_size: int = 10
    prompt_cache_bytes: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        """Check the options."""
        self.cache_options()
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            raise OutlierError("the API key must be printable ASCII, without spaces around it")
        if key == "":
            raise OutlierError("the API key is empty")
        for origin in self.allow_origins:
            scheme, found, rest = origin.partition("://")
            if origin not in ("*", "null") and not (scheme and found and rest.rstrip("/") == rest):
                raise OutlierError(f"--allow-origin {origin}: expected SCHEME://HOST[:PORT], or *")

    def cache_options(self) -> Options:
        """The options of the KV cache.

        Raises:
            OutlierError: one has a value that is not allowed.
        """
        return Options(
            kv_bits=self.kv_bits,
            kv_group_size=self.kv_group_size,
            quantized_kv_start=self.quantized_kv_start,
        )

    def access(self) -> Access:
        """The access rules that follow from host, origins and key."""
        names = [host_name(host) for host in (self.host, *self.allow_hosts)]
        return Access(
            frozenset(name for name in names if name and not is_address(name)),
            frozenset(origin.lower() for origin in self.allow_origins),
            self.api_key,
        )

    def arguments(self) -> argparse.Namespace:
        """The options as `mlx_lm.server` parses them from its command line."""
        return argparse.Namespace(
            model=None,
            adapter_path=None,
            draft_model=None,
            num_draft_tokens=0,
            trust_remote_code=False,
            chat_template="",
            use_default_chat_template=False,
            chat_template_args={},
            allowed_origins=[],
            pipeline=False,
            temp=self.temp,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_tokens=self.max_tokens,
            prefill_step_size=self.prefill_step_size,
            decode_concurrency=self.decode_concurrency,
            prompt_concurrency=self.prompt_concurrency,
            prompt_cache_size=self.prompt_cache_size,
            prompt_cache_bytes=self.prompt_cache_bytes,
            kv_bits=self.kv_bits,
            kv_group_size=self.kv_group_size,
            quantized_kv_start=self.quantized_kv_start,
        )


class Server(ThreadingHTTPServer):
    """An HTTP server for one model. The constructor binds the port; `start` begins to listen.

    Args:
        name: the model's name, as clients see it.
        load: returns model and tokenizer; called in the thread that generates.
        options: see `ServeOptions`.
        log: called with one line for each request.
        warn: called with one line for each unexpected error.

    Raises:
        OutlierError: the address cannot be bound, or it requires an API key.
    """

    request_queue_size = 128
    generator: Generator

    def __init__(
        self,
        name: str,
        load: Load,
        options: ServeOptions,
        log: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.options = options
        self.load = load
        self.service = Service(
            name,
            options.access(),
            options.max_body,
            options.max_tokens,
            options.max_context,
            log,
            warn,
        )
        self._connections = 0
        self._connections_changed = threading.Condition()
        self.address_family, address = _resolve(options)
        try:
            super().__init__(address, Handler, bind_and_activate=False)
            self.server_bind()
        except OSError as error:
            if hasattr(self, "socket"):
                self.server_close()
            place = f"{options.host}:{options.port}"
            raise OutlierError(f"{place}: {error.strerror}; choose another --port") from None

    @property
    def url(self) -> str:
        """The base URL for clients; that of this machine if the server binds all addresses."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if host in ANY_HOST:
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def server_bind(self) -> None:
        """Bind without the DNS lookup of this machine's name that http.server makes."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.options.host, self.server_address[1]

    def start(self) -> None:
        """Load the model, then listen.

        Raises:
            OutlierError: the model cannot be loaded.
        """
        provider = OneModel(self.options.arguments(), self.service, self.load)
        options = self.options
        self.generator = Generator(provider, options.prompt_cache_size, options.prompt_cache_bytes)
        self.RequestHandlerClass = partial(Handler, self.service, self.generator)
        provider.loaded.wait()
        if provider.failure is not None:
            raise provider.failure
        self.server_activate()

    def stop(self) -> bool:
        """End all replies and the thread that generates.

        Returns:
            Whether the thread ended within `SHUTDOWN_SECONDS`.
        """
        generator = getattr(self, "generator", None)
        ended = generator is None or generator.stop(SHUTDOWN_SECONDS)
        with self._connections_changed:
            self._connections_changed.wait_for(lambda: not self._connections, SHUTDOWN_SECONDS)
        self.server_close()
        return ended

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in a new thread, or answer 503 if there are too many."""
        with self._connections_changed:
            full = self._connections >= self.options.max_clients
            self._connections += not full
        if full:
            request.settimeout(1)
            request.sendall(_too_many_connections())
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # the system could not start a thread
            self._connection_ended()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection, and lower the number of connections at its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connection_ended()

    def _connection_ended(self) -> None:
        with self._connections_changed:
            self._connections -= 1
            self._connections_changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error that ended a connection in one line."""
        error = sys.exception()
        self.service.warn(f"{client_address[0]} {type(error).__name__}: {error}")


def _too_many_connections() -> bytes:
    body = json.dumps(Refused(503, "too many connections; try again").as_json()).encode()
    head = (
        "HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _resolve(options: ServeOptions) -> tuple[socket.AddressFamily, Any]:
    """Find the address to bind.

    Raises:
        OutlierError: the host is unknown, or other machines can reach it and no key is set.
    """
    try:
        found = socket.getaddrinfo(
            options.host or None,
            options.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
    except OSError as error:
        raise OutlierError(f"--host {options.host}: {error.strerror}") from None
    # IPv4 first: not every client tries ::1 for "localhost".
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, *_, address = found[0]
    loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if options.api_key is None and not loopback:
        raise OutlierError(
            f"--host {options.host} can be reached from other machines: set an API key"
            " (--api-key, or the environment variable OUTLIER_MLX_API_KEY)"
        )
    return family, address


def serve(
    name: str,
    load: Load,
    options: ServeOptions,
    log: Callable[[str], None],
    *,
    note: str = "",
    quiet: bool = False,
) -> NoReturn:
    """Serve until SIGINT or SIGTERM, then end the process with exit code 0.

    Call it in the main thread: only there can Python handle signals.

    Args:
        name: the model's name, as clients see it.
        load: returns model and tokenizer; called in the thread that generates.
        options: see `ServeOptions`.
        log: called with one line at a time for the user.
        note: a line to log once the server is ready.
        quiet: log neither the note nor a line for each request.

    Raises:
        OutlierError: the address cannot be bound, it requires an API key, or the model cannot be
            loaded.
    """
    server = Server(name, load, options, (lambda _: None) if quiet else log, log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        with working(f"loading {name}", quiet=quiet):
            server.start()
        log(f"serving {name} at {server.url} (press Ctrl-C to stop)")
        if note and not quiet:
            log(note)
        server.serve_forever()
    except KeyboardInterrupt:
        log("shutting down")
    finally:
        # A second signal ends the process immediately.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        server.stop()
    # Skip Python's own shutdown. MLX may still be freeing the compiled functions of the generating
    # thread after Python has joined it; this needs the GIL, and the process aborts if the
    # interpreter ends first. Also, a long step of the model may still be running.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
