"""How the page is served: on this machine alone unless a password is set, with limits, and without reaching for a network.

gradio's `launch()` would ask its own server over HTTP whether it has started, through whatever proxy is set, and has no place
for a rule that comes before all of its routes. So the page is mounted into an application of ours, which uvicorn serves.
"""

import argparse
import errno
import getpass
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.themes import Base
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ddpo.app.guards import BODY, Bodies, Closed, Guarded, Password, Quiet, SameOrigin

UPLOAD = 20 * 2**20  # bytes of a picture
WAITING = 64  # events that queue; more are answered with 503 at once
CONNECTIONS = 512  # more are answered with 503. A page that is open holds two
SHORTEST_PASSWORD = 8
LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]"]
ANYWHERE = ("0.0.0.0", "::")  # these are no names: whoever is let in by the password may call the machine as he likes


@dataclass(frozen=True)
class Settings:
    """Where the page is served and to whom.

    Args:
        host: an address of this machine; 127.0.0.1 can be reached from this machine alone.
        port: 0 takes one that is free.
        password: what visitors must know; None asks for none.
        open: show the page in the browser.

    Raises:
        ValueError: others could reach it without a password, or the password is short.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    password: str | None = None
    open: bool = False

    def __post_init__(self) -> None:
        if self.password is None and not loopback(self.host):
            raise ValueError(
                f"--host {self.host} lets other machines in: set a password in an environment variable and name it, as in "
                "--password-env DDPO_PASSWORD, or leave --host out and use an SSH tunnel"
            )
        if self.password is not None and len(self.password) < SHORTEST_PASSWORD:
            raise ValueError(f"the password is shorter than {SHORTEST_PASSWORD} characters; choose a longer one")


@dataclass(frozen=True)
class Look:
    """What gradio 6 wants when a page is served, and not when it is made."""

    theme: Base | None = None
    css_paths: Sequence[Path] = ()
    head: str = ""


def main(
    parser: argparse.ArgumentParser,
    words: list[str],
    build: Callable[[argparse.Namespace], gr.Blocks],
    look: Look = Look(),
) -> int:
    """Serve what `build` makes of the arguments. Returns the exit code.

    Args:
        parser: knows the page's own arguments; those of serving are added.
    """
    parser.add_argument("--host", default=Settings.host, help="other than this machine alone; demands a password")
    parser.add_argument("--port", type=int, default=Settings.port, help="0 takes one that is free")
    parser.add_argument("--password-env", metavar="NAME", help="the environment variable that holds the page's password")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    args = parser.parse_args(words)
    try:
        settings = Settings(args.host, args.port, _password(args.password_env, args.host), args.open)
        with _ended_by_sigterm():
            serve(lambda: build(args), settings, look)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def serve(build: Callable[[], gr.Blocks], settings: Settings, look: Look = Look()) -> None:
    """Serve a page until SIGINT or SIGTERM.

    Args:
        build: makes the page. It is called when gradio's own files, the pictures among them, have a private folder.

    Raises:
        OSError: the port is taken, or the host is none of this machine's; the message says what is free.
    """
    with _listener(settings.host, settings.port) as listener, _private_folder() as folder:
        made = application(build(), settings, folder, look)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{listener.getsockname()[1]}/"
        print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
        if settings.open:
            webbrowser.open(url)  # the socket listens already: the browser waits for the first answer
        config = uvicorn.Config(
            made,
            log_level="warning",
            server_header=False,
            ws="none",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=3,
        )
        with suppress(KeyboardInterrupt):  # uvicorn has shut down by then
            uvicorn.Server(config).run(sockets=[listener])


def application(page: gr.Blocks, settings: Settings, folder: Path, look: Look = Look()) -> FastAPI:
    """The page behind its guards, as an ASGI application.

    Args:
        folder: gradio's own, where it keeps what is uploaded.
    """
    names = ["*"] if settings.host in ANYWHERE else [*LOCAL_NAMES, settings.host]
    guards = [Middleware(Quiet), Middleware(Guarded), Middleware(TrustedHostMiddleware, names, www_redirect=False)]
    guards.append(Middleware(SameOrigin))
    if settings.password is not None:
        guards.append(Middleware(Password, settings.password))
    guards += [Middleware(Closed), Middleware(Bodies, upload=UPLOAD + BODY, folder=folder)]
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)  # no request passes by the queue
    page.has_launched = True  # else gradio does not look whether a file that a request names is one that was uploaded
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None, middleware=guards), page, "/", settings.host, settings.port, footer_links=[], run_history=False,
        app_kwargs={"openapi_url": None}, allowed_paths=[], show_error=False, max_file_size=UPLOAD, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=look.theme, css_paths=list(look.css_paths), head=look.head,
    )  # fmt: skip


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is taken; this one is free: --port {_free(host, family)}") from None
        raise OSError(f"nothing can be served on --host {host} --port {port}: {error}") from None


def _free(host: str, family: socket.AddressFamily) -> int:
    with socket.create_server((host, 0), family=family) as listener:
        return listener.getsockname()[1]


@contextmanager
def _private_folder() -> Iterator[Path]:
    """gradio's folder of uploads and pictures: only this user can read it (0700), and it is removed at the end."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="ddpo-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program through its `finally`s, with exit code 143."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def loopback(host: str) -> bool:
    """Whether a host is this machine alone. (That of `rewards` would bring torch, which looking at runs does without.)"""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _password(variable: str | None, host: str) -> str | None:
    """From the environment; asked for where one is needed and someone can answer.

    Raises:
        ValueError: the variable is empty or not there. The password is not shown.
    """
    if variable is not None:
        if not (found := os.environ.get(variable)):
            raise ValueError(f"the environment variable {variable}, named in --password-env, is not set")
        return found
    if loopback(host) or not sys.stdin.isatty():
        return None
    return getpass.getpass(f"Others can reach the page on {host}. Its password: ")
