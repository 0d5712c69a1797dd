"""The app as it is served, under what strangers and their pages might send: `pytest tests/test_app_hardening.py`

A page whose drawing is a sleep (tests/hardened_page.py) and the real one, each in a process of its own that is asked over HTTP.
Everything stays on 127.0.0.1. The heavier loads are marked slow.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx2
import psutil
import pytest
from PIL import Image

from rewards._pictures import to_png

ROOT = Path(__file__).parent.parent
SECRET = secrets.token_hex(16)
CHROMIUM = "/usr/bin/chromium"
OFFLINE = {"HF_HUB_OFFLINE", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"}


@dataclass
class Served:
    """A page served by another process."""

    process: subprocess.Popen
    port: int
    log: Path

    def said(self, since: int = 0) -> str:
        """Its log. gradio prints a traceback for input of a wrong type that one of its components finds, so `since` when."""
        return self.log.read_text()[since:]

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | headers
        return httpx2.post(f"http://127.0.0.1:{self.port}{path}", content=content, headers=sent, timeout=60)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return httpx2.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=60)

    def call(self, name: str, *data: object) -> tuple[str, object]:
        """How an event ends: ("complete", its outputs), ("error", what was said), or the refusal's status and text."""
        asked = self.post(f"/gradio_api/call/{name}", {"data": data})
        if asked.status_code != 200:
            return str(asked.status_code), asked.text
        with httpx2.stream("GET", self.url(f"/gradio_api/call/{name}/{asked.json()['event_id']}"), timeout=60) as answer:
            lines = [line for line in answer.iter_lines() if line and "heartbeat" not in line]
        return lines[-2].removeprefix("event: "), json.loads(lines[-1].removeprefix("data: "))

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def counts(self) -> dict[str, int]:
        return self.call("counts")[1][0]

    def raw(self, method: str, path: str, **headers: str) -> tuple[int, bytes]:
        """A request whose path is sent as it stands."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read(2**20)
        finally:
            connection.close()


@contextlib.contextmanager
def served(command: list[str], log: Path) -> Iterator[Served]:
    """Without the environment of these tests that would keep it from the network by itself."""
    env = {k: v for k, v in os.environ.items() if k not in OFFLINE} | {"PYTHONPATH": str(ROOT), "SERVED_SECRET": SECRET}
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *command], cwd=log.parent, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(6000):
            if "The page is at" in log.read_text() or process.poll() is not None:
                break
            time.sleep(0.05)
        where = log.read_text().partition("The page is at http://127.0.0.1:")[2]
        assert where, log.read_text()
        yield Served(process, int(where.partition("/")[0]), log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fake")
    (folder / "secret.txt").write_text(SECRET)
    with served(["-m", "tests.hardened_page", "--port", "0"], folder / "log") as server:
        yield server


WATCHED_APP = """
import sys
from tests.hardened_page import watch  # adds the hook
from ddpo.app.frame import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("real")
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "run.json").write_text(json.dumps({"name": "first", "status": "finished"}))
    with served(["-c", WATCHED_APP, "--port", "0", "--runs", "runs"], folder / "log") as server:
        yield server


@pytest.fixture(params=["fake", "real"])
def either(request) -> Served:
    return request.getfixturevalue(request.param)


def test_it_listens_on_this_machine_alone_and_reaches_for_nothing(either):
    assert either.get("/").status_code == 200
    watched = [line for line in either.said().splitlines() if line.startswith("WATCHED")]
    assert len(watched) == 1 and "socket.bind" in watched[0] and "'127.0.0.1'" in watched[0], watched
    connections = psutil.Process(either.process.pid).net_connections()
    assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    assert {c.raddr.ip for c in connections if c.raddr} <= {"127.0.0.1"}


def test_what_the_page_says_of_itself_names_no_folder(either):
    temporary = [p for p in Path(tempfile.gettempdir()).glob("ddpo-app-*")]
    assert temporary and all(p.stat().st_mode & 0o777 == 0o700 for p in temporary if p.owner() == Path.home().owner())
    for path in ("/", "/config", "/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/openapi.json"):
        said = either.get(path).text
        # Whole: a checkout may be in /app, with which a route of Gradio's may begin too.
        for place in (either.log.parent, ROOT, Path.home()):
            assert not re.search(rf"(?<![\w<./-]){re.escape(str(place))}(?![\w.-])", said), f"{path} names {place}"
        assert "ddpo-app-" not in said
    assert [either.get(p).status_code for p in ("/monitoring", "/gradio_api/runs", "/docs", "/openapi.json")] == [404] * 4


def test_every_answer_keeps_the_browser_to_this_page(either):
    for path in ("/", "/config", "/theme.css", "/gradio_api/nowhere", "/monitoring"):
        headers = either.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff", (
            path
        )
        assert headers["referrer-policy"] == "no-referrer" and "uvicorn" not in headers.get("server", "")
    assert "http" not in either.get("/").headers["content-security-policy"]  # no other origin is allowed in


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "[::1].evil.example"])
def test_a_foreign_host_header_is_refused(either, host):
    assert either.raw("GET", "/config", Host=host)[0] == 400


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:7860", "LOCALHOST:80"])
def test_this_machine_has_several_names(either, host):
    assert either.raw("GET", "/config", Host=host)[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1.evil.example"])
def test_a_page_of_another_origin_is_refused(fake, origin):
    before = fake.counts()["steps"]
    body = {"data": ["a", 1, 1]}
    assert fake.post("/gradio_api/call/draw", body, Origin=origin).status_code == 403
    assert fake.post("/gradio_api/call/draw", body, Origin=origin, **{"Content-Type": "text/plain"}).status_code == 403
    answer = httpx2.options(
        fake.url("/gradio_api/call/draw"), headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
    )
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert fake.counts()["steps"] == before
    assert fake.post("/gradio_api/call/counts", {"data": []}, Origin=fake.url("")).status_code == 200


def test_bodies_have_a_limit_of_their_own(either):
    huge = json.dumps({"data": ["x" * 10_000_000]}).encode()
    for path in (
        "/gradio_api/call/draw",
        "/gradio_api/queue/join",
        "/gradio_api/nowhere",
        "/login",
        "/gradio_api/upload/../call/x",
    ):
        answer = either.post(path, huge)
        assert answer.status_code == 413 and "longer than 65,536 bytes" in answer.json()["detail"], path

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    answer = httpx2.post(either.url("/gradio_api/queue/join"), content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413  # and where no length was announced
    assert either.get("/config").status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "Expecting"),
        (b"[" * 30_000, "recursion"),
        (b'{"data": [NaN]}', "NaN is not a number of JSON"),
        (rb'{"data": ["a\u0000b", 1, 1]}', "not text"),
        (rb'{"data": ["\ud83d", 1, 1]}', "not text"),
        (rb'{"data": [{"\udc00": 1}]}', "not text"),
        (b'{"data": [{"path": "http://127.0.0.1:22/x.png", "meta": {"_type": "gradio.FileData"}}]}', "upload it"),
        (b'{"data": [[{"path": "HTTPS://example.com/x.png"}]]}', "upload it"),
        (b"\xff\xfe", "cannot be used"),
    ],
)
def test_what_is_no_request_is_told_why(either, body, said):
    before = len(either.said())
    for path in ("/gradio_api/call/size", "/gradio_api/queue/join", "/gradio_api/component_server"):
        answer = either.post(path, body)
        assert answer.status_code == 400 and said in answer.json()["detail"], answer.text
    assert either.said(before) == ""


def test_events_that_do_not_exist_cost_a_line_of_the_log(either):
    before = len(either.said())
    nobody = {"data": [], "session_hash": "abc", "fn_index": 10_000}
    for path, body in {
        "/gradio_api/queue/join": nobody,
        "/gradio_api/run/predict": nobody,
        "/gradio_api/call/nowhere": {"data": []},
        "/gradio_api/call/v2/nowhere": {},
        "/gradio_api/component_server": {"data": 1, "component_id": 10_000, "session_hash": "a", "fn_name": "__init__"},
        "/gradio_api/cancel": {"session_hash": "a", "fn_index": 9, "event_id": "b"},
    }.items():
        either.post(path, body)
        assert either.get("/config").status_code == 200
    for path in ("/gradio_api/queue/data?session_hash=nobody", "/gradio_api/call/draw/nobody"):
        with contextlib.suppress(httpx2.RemoteProtocolError):  # the stream of no one just ends
            either.get(path)
    said = either.said(before)
    assert "Traceback" not in said and len(said) < 1000 and "'/gradio_api/queue/join' failed: KeyError" in said


def test_no_request_passes_by_the_queue(fake):
    before = fake.counts()["steps"]
    for path in ("/gradio_api/run/draw", "/gradio_api/api/draw", "/gradio_api/run/draw/"):
        assert fake.post(path, {"data": ["a", 1, 1]}).status_code == 404
    assert fake.counts()["steps"] == before


WRONG = {  # data of /draw: what is said in the end
    "nothing": ([None, None, None], "please"),
    "a prompt that is a list": ([["a"], 1, 1], ""),
    "a prompt that is an object": ([{"a": 1}, 1, 1], ""),
    "a seed below zero": (["a", -1, 1], "0..2147483647"),
    "a seed of 1e300": (["a", 1e300, 1], "0..2147483647"),
    "a seed that is text": (["a", "one", 1], ""),
    "a billion steps": (["a", 1, 10**9], "1..200"),
    "a long prompt": (["a" * 10_000, 1, 1], "2000 characters"),
    "too few arguments": (["a"], ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_told_and_the_next_request_is_answered(fake, name):
    data, said = WRONG[name]
    how, answer = fake.call("draw", *data)
    if how == "complete":
        assert answer == [f"{data[0]} 1"] or answer == ["['a'] 1"], answer  # gradio made a text of it
    else:
        assert how in ("error", "422") and said in json.dumps(answer), (how, answer)
    assert fake.call("draw", "a", 7, 1) == ("complete", ["a 7"])


def test_every_public_endpoint_of_the_real_page_outlives_wrong_input(real):
    """Whatever other parts of the app offer by name: nothing they are sent ends the server."""
    hostile = [None, ["a"], {"a": 1}, -1, 1e300, 10**9, "a" * 10_000, "../../../etc/passwd", "<script>alert(1)</script>", True]
    endpoints = real.get("/gradio_api/info").json()["named_endpoints"]
    for name, endpoint in endpoints.items():
        for value in hostile:
            how, answer = real.call(name.strip("/"), *[value] * len(endpoint["parameters"]))
            assert how in ("complete", "error", "400", "413", "422"), (name, value, how, answer)
    assert real.process.poll() is None and real.get("/config").status_code == 200


ROUTES = ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/", "/gradio_api/proxy="]


def places(folder: Path) -> list[str]:
    up, secret = "../" * 12, str(folder / "secret.txt")
    return [
        secret, quote(secret, safe=""), f"file://{secret}", up + secret.lstrip("/"), up.replace("..", "%2e%2e") + secret.lstrip("/"),
        up.replace("../", "%252e%252e%252f") + secret.lstrip("/"), "secret.txt", "/proc/self/environ",
        up.replace("/", "%5c") + "etc%5cpasswd", "http://127.0.0.1:22",
    ]  # fmt: skip


def test_seventy_tries_to_read_a_file_read_none(fake):
    tries = [(route, place) for route in ROUTES for place in places(fake.log.parent)]
    assert len(tries) == 70
    before = len(fake.said())
    for route, place in tries:
        status, body = fake.raw("GET", route + place)
        assert SECRET.encode() not in body and b"root:x:0" not in body and b"SSH-2" not in body, route + place
        assert status in (307, 400, 403, 404, 405), (status, route + place)
    assert "Traceback" not in fake.said(before)


def upload(server: Served, name: str, data: bytes) -> httpx2.Response:
    return httpx2.post(server.url("/gradio_api/upload"), files={"files": (name, data, "image/png")}, timeout=60)


def test_an_upload_is_kept_under_its_bare_name_and_read_by_an_event(fake):
    """Which also shows that the route of the seventy tries does give files: those that are meant to be given."""
    data = to_png(Image.new("RGB", (7, 5), "red"))
    stored = upload(fake, "../../../../outside.png", data).json()[0]
    assert Path(stored).name == "outside.png" and "/ddpo-app-" in stored and ".." not in stored
    assert fake.get(f"/gradio_api/file={stored}").content == data
    assert fake.call("size", {"path": stored, "meta": {"_type": "gradio.FileData"}}) == ("complete", [[7, 5]])


def test_an_event_reads_only_what_was_uploaded(fake):
    """A picture of this machine is no input, wherever it lies: gradio would read it, or copy it to where the page can fetch it."""
    own = fake.log.parent / "own.png"
    own.write_bytes(to_png(Image.new("RGB", (7, 5), "red")))
    folder = next(Path(tempfile.gettempdir()).glob("ddpo-app-*"))
    for path in (str(own), "own.png", f"/proc/{fake.process.pid}/cwd/own.png", f"{folder}/../{own.relative_to(folder.parent)}"):
        for file in ({"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}):
            how, answer = fake.call("size", file)
            assert how == "400" and "so upload it" in answer, (file, how, answer)


def test_gradio_looks_too_at_what_an_event_may_read():
    """Which a page that is mounted and not launched goes without: the guard above is not alone."""
    import gradio as gr

    from ddpo.app.serve import Settings, application

    with gr.Blocks() as page:
        gr.Textbox()
    application(page, Settings(), Path(tempfile.gettempdir()))
    from gradio.context import LocalContext
    from gradio.exceptions import InvalidPathError
    from gradio.processing_utils import _check_allowed

    token = LocalContext.blocks.set(page)
    try:
        with pytest.raises(InvalidPathError):
            _check_allowed(__file__, True)
    finally:
        LocalContext.blocks.reset(token)


def test_an_upload_over_the_limit_is_refused(fake):
    assert upload(fake, "x.png", bytes(21 * 2**20)).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield b"x"

    assert httpx2.post(fake.url("/gradio_api/upload"), content=pieces()).status_code == 411


@pytest.mark.slow
def test_a_hundred_at_once_are_answered_or_refused_each_with_its_own_and_one_at_a_time(fake):
    before, said = psutil.Process(fake.process.pid).memory_info().rss, len(fake.said())
    with ThreadPoolExecutor(100) as pool:
        found = list(pool.map(lambda seed: fake.call("draw", "a cat", seed, 2), range(100)))
    done = [seed for seed, (how, answer) in enumerate(found) if how == "complete" and answer == [f"a cat {seed}"]]
    refused = [seed for seed, (how, _) in enumerate(found) if how == "503"]
    assert sorted(done + refused) == list(range(100)) and len(done) >= 60, found
    counts = fake.counts()
    assert counts["most"] == 1 and counts["running"] == 0
    assert psutil.Process(fake.process.pid).memory_info().rss - before < 50 * 2**20
    assert fake.said(said) == ""


@pytest.mark.slow
def test_clients_that_vanish_stop_their_work(fake):
    said = len(fake.said())
    asked = [fake.post("/gradio_api/call/draw", {"data": ["a", i, 200]}).json()["event_id"] for i in range(10)]
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(httpx2.stream("GET", fake.url(f"/gradio_api/call/draw/{event}"), timeout=60)) for event in asked
        ]
        next(line for line in streams[0].iter_lines() if "generating" in line)
    steps = fake.counts()["steps"]
    assert fake.call("draw", "a", 7, 1) == ("complete", ["a 7"])
    assert fake.counts()["running"] == 0
    assert fake.counts()["steps"] - steps < 100  # of the 2000 that they asked for
    assert fake.said(said) == ""


# ----------------------------------------------------------------------------------------------------------------------
# To whom it is served


def command(words: list[str], capsys) -> tuple[int, str]:
    """The exit code and the message of a page that must not come up."""
    from ddpo.app import serve

    def built(args):
        raise AssertionError("the page was built")

    return serve.main(argparse.ArgumentParser(), words, built), capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_other_machines_are_let_in_with_a_password_only(host, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # nobody is there to be asked
    monkeypatch.setenv("SHORT", "1234567")
    code, said = command(["--host", host], capsys)
    assert code == 2 and "--password-env" in said and "SSH tunnel" in said
    code, said = command(["--host", host, "--password-env", "NOWHERE"], capsys)
    assert code == 2 and "NOWHERE" in said and "not set" in said
    code, said = command(["--host", host, "--password-env", "SHORT"], capsys)
    assert code == 2 and "shorter than 8" in said and "1234567" not in said


def test_a_port_that_is_taken_is_told_with_one_that_is_free(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        code, said = command(["--port", str(taken)], capsys)
    assert code == 2 and f"port {taken} is taken" in said
    free = int(said.rpartition("--port ")[2])
    socket.create_server(("127.0.0.1", free)).close()
    assert command(["--port", "99999"], capsys)[0] == 2


def test_nothing_is_answered_before_the_password(tmp_path):
    import gradio as gr
    from starlette.testclient import TestClient

    from ddpo.app.serve import Settings, application

    with gr.Blocks() as page:
        gr.Textbox()
    made = application(page, Settings(host="0.0.0.0", password="correct größe"), tmp_path)

    def basic(words: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(words.encode()).decode()}

    with TestClient(made, base_url="http://gpu.example:7860") as client:
        for path in (
            "/",
            "/config",
            "/theme.css",
            "/gradio_api/info",
            "/gradio_api/queue/join",
            "/gradio_api/upload",
            "/assets/x",
        ):
            assert client.get(path).status_code == 401 and client.post(path).status_code == 401, path
        for wrong in (
            basic("any:wrong one"),
            basic("any:"),
            basic("correct größe"),
            {"Authorization": "Basic %"},
            {"Authorization": ""},
        ):
            answer = client.get("/", headers=wrong)
            assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
        assert client.get("/", headers=basic("any:correct größe")).status_code == 200


# ----------------------------------------------------------------------------------------------------------------------
# How it ends; last, since it ends the servers


@pytest.mark.slow
def test_a_browser_shows_it_without_an_error_and_without_leaving_the_machine(real, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM}")
    heard = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("console", lambda m: heard.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: heard.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((real.url(""), "data:", "blob:")) else heard.append(r.url))
        page.goto(real.url("/"))
        page.wait_for_selector("#run")
        page.wait_for_timeout(1000)
        browser.close()
    assert heard == []


@pytest.mark.parametrize(("name", "number", "code"), [("fake", signal.SIGINT, 0), ("real", signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly_with_a_page_open(request, name, number, code):
    server: Served = request.getfixturevalue(name)
    with httpx2.stream("GET", server.url("/gradio_api/heartbeat/someone"), timeout=60) as open_page:
        next(open_page.iter_lines())
        folders = set(Path(tempfile.gettempdir()).glob("ddpo-app-*"))
        before = server.said()
        server.process.send_signal(number)
        assert server.process.wait(30) == code
    assert len(folders - set(Path(tempfile.gettempdir()).glob("ddpo-app-*"))) == 1
    assert server.said() == before, server.said()
