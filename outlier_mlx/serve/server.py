"""Binding, loading, serving, ending."""

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

# What is still under way when the server ends is cut off after so long.
END_SECONDS = 3.0
ANY_HOST = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class ServeOptions:
    """Where to serve, to whom, and how; the last twelve are those of `mlx_lm.server`.

    Attributes:
        host: address or name to bind.
        port: 0 takes a free one.
        api_key: what requests must carry; needed unless the host is a loopback address.
        allow_origins: web origins that may ask, such as "https://chat.example"; "*" is any.
        allow_hosts: names besides `host`, "localhost" and IP addresses that may stand in Host.
        max_tokens: tokens that an answer may have; what a request gets that names no number.
        max_body: bytes that a request's body may have.
        max_context: tokens that prompt and answer may have together; None: as the model has it.
        max_clients: connections at a time; more are told to come back.

    Raises:
        OutlierError: they are no options to serve with.
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
        """Refuse now what would be refused, or dangerous, later."""
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
        """The options of the KV cache, checked."""
        return Options(
            kv_bits=self.kv_bits,
            kv_group_size=self.kv_group_size,
            quantized_kv_start=self.quantized_kv_start,
        )

    def access(self) -> Access:
        """Who may ask."""
        names = [host_name(host) for host in (self.host, *self.allow_hosts)]
        return Access(
            frozenset(name for name in names if name and not is_address(name)),
            frozenset(origin.lower() for origin in self.allow_origins),
            self.api_key,
        )

    def arguments(self) -> argparse.Namespace:
        """What `mlx_lm.server` would have got from its command line."""
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
    """Bound to its port at once; it listens from `start` on.

    Args:
        name: the model's, as clients see it.
        load: makes model and tokenizer; called in the thread that generates.
        options: where to serve, to whom, and how.
        log: takes a line for each request.
        warn: takes a line for what should not happen.

    Raises:
        OutlierError: the address cannot be bound, or needs a key.
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
        self._active = 0
        self._change = threading.Condition()
        self.address_family, address = _resolve(options)
        try:
            super().__init__(address, Handler, bind_and_activate=False)
            self.server_bind()
        except OSError as error:
            if hasattr(self, "socket"):
                self.server_close()
            place = f"{options.host}:{options.port}"
            raise OutlierError(f"{place}: {error.strerror}; --port takes another") from None

    @property
    def url(self) -> str:
        """The base URL for clients on this machine or, if the host is not any, on others."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if host in ANY_HOST:
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def server_bind(self) -> None:
        """Bind, without asking a name server for this machine's name as http.server does."""
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
        """End replies and the thread that generates; whether all ended in time."""
        generator = getattr(self, "generator", None)
        ended = generator is None or generator.stop(END_SECONDS)
        with self._change:
            self._change.wait_for(lambda: not self._active, END_SECONDS)
        self.server_close()
        return ended

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, if there are not too many."""
        with self._change:
            full = self._active >= self.options.max_clients
            self._active += not full
        if full:
            request.settimeout(1)
            request.sendall(_busy())
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread was to be had
            self._leave()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and count it out."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._change:
            self._active -= 1
            self._change.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection in one line."""
        error = sys.exception()
        self.service.warn(f"{client_address[0]} {type(error).__name__}: {error}")


def _busy() -> bytes:
    body = json.dumps(Refused(503, "too many connections; try again").as_json()).encode()
    head = (
        "HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _resolve(options: ServeOptions) -> tuple[socket.AddressFamily, Any]:
    """The address to bind.

    Raises:
        OutlierError: there is none, or others can reach it and no key was given.
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
    # Clients try 127.0.0.1 for "localhost" more surely than ::1.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, *_, address = found[0]
    loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if options.api_key is None and not loopback:
        raise OutlierError(
            f"--host {options.host} can be reached from other machines: an API key is needed"
            " (--api-key, or the variable OUTLIER_MLX_API_KEY)"
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
    """Serve until SIGINT or SIGTERM, then end the process with status 0. For the main thread.

    Args:
        name: the model's, as clients see it.
        load: makes model and tokenizer; called in the thread that generates.
        options: where to serve, to whom, and how.
        log: takes lines for people.
        note: what to say besides once it serves.
        quiet: no note, and no line for each request.

    Raises:
        OutlierError: the address cannot be bound or needs a key, or the model cannot be loaded.
    """
    server = Server(name, load, options, (lambda _: None) if quiet else log, log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        with working(f"loading {name}", quiet=quiet):
            server.start()
        log(f"serving {name} at {server.url} (Ctrl-C ends it)")
        if note and not quiet:
            log(note)
        server.serve_forever()
    except KeyboardInterrupt:
        log("ending")
    finally:
        # A second signal ends at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        server.stop()
    # MLX frees what a thread compiled when that thread is gone for Python already, but with the
    # interpreter's lock, and aborts the process if the interpreter ends meanwhile. And a long step
    # of the model may still be under way.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
