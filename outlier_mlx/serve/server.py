"""Start the server, serve the model, and shut down."""

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any, NoReturn

from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.connections import Connections
from outlier_mlx.serve.generator import Generator
from outlier_mlx.serve.handler import Handler
from outlier_mlx.serve.http import Service
from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.provider import Load, LoadDraft, OneModel
from outlier_mlx.terminal import working

# Time limit for replies that are still being generated when the server shuts down.
SHUTDOWN_SECONDS = 3.0
ANY_HOST = ("0.0.0.0", "::", "")


class Server(ThreadingHTTPServer):
    """An HTTP server for one model. The constructor binds the port; `start` begins to listen.

    Args:
        name: the model's name, as clients see it.
        load: returns model and tokenizer; called in the thread that generates.
        options: see `ServeOptions`.
        log: called with one line for each request.
        warn: called with one line for each unexpected error.
        load_draft: returns a draft model; None: there is none.

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
        load_draft: LoadDraft | None = None,
    ) -> None:
        self.options = options
        self.load, self.load_draft = load, load_draft
        self.connections = Connections(options.max_clients)
        self.service = Service(name, options, options.access(), log, warn, self.connections)
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
        return f"{self.page_url}v1"

    @property
    def page_url(self) -> str:
        """The URL of the page for browsers, on the same host."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if host in ANY_HOST:
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

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
        provider = OneModel(self.service, self.load, self.load_draft)
        self.generator = Generator(provider)
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
        self.connections.close(SHUTDOWN_SECONDS)
        self.server_close()
        return ended

    def get_request(self) -> tuple[Any, Any]:
        """A new connection, which takes the place of http.server's socket, and its address."""
        accepted, address = super().get_request()
        return self.connections.admit(accepted, address[0]), address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in a new thread."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system could not start a thread
            request.turn_away()
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self.connections.leave(request)
        super().shutdown_request(request.socket)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error that ended a connection in one line."""
        error = sys.exception()
        if isinstance(error, ConnectionError):
            self.service.log(f"{client_address[0]} the client disconnected")
            return
        self.service.warn(f"{client_address[0]} {type(error).__name__}: {error}")


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
    load_draft: LoadDraft | None = None,
    note: str = "",
    quiet: bool = False,
) -> NoReturn:
    """Serve until SIGINT, SIGTERM or SIGHUP, then end the process with exit code 0.

    Call it in the main thread: only there can Python handle signals.

    Args:
        name: the model's name, as clients see it.
        load: returns model and tokenizer; called in the thread that generates.
        options: see `ServeOptions`.
        log: called with one line at a time for the user.
        load_draft: returns a draft model, as `load` does; None: there is none.
        note: a line to log once the server is ready.
        quiet: log neither the note nor a line for each request.

    Raises:
        OutlierError: the address cannot be bound, it requires an API key, or the model cannot be
            loaded.
    """
    server = Server(name, load, options, (lambda _: None) if quiet else log, log, load_draft)
    ending = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as `nohup` leaves it
        ending.append(signal.SIGHUP)
    for number in ending:
        signal.signal(number, _interrupt)
    try:
        with working(f"loading {name}", quiet=quiet):
            server.start()
        log(f"serving {name} at {server.url} (press Ctrl-C to stop)")
        if not quiet:
            log(f"talk to it in a browser: {server.page_url}")
            if note:
                log(note)
        server.serve_forever()
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may be gone
            log("shutting down")
    finally:
        # A second signal ends the process immediately.
        for number in ending:
            signal.signal(number, signal.SIG_DFL)
        server.stop()
    # Skip Python's own shutdown. MLX may still be freeing the compiled functions of the generating
    # thread after Python has joined it; this needs the GIL, and the process aborts if the
    # interpreter ends first. Also, a long step of the model may still be running.
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
