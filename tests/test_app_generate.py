"""The Generate and Score tabs through their endpoints, on the real app over a small run folder that is made here."""

import contextlib
import csv
import json
import time

import httpx2
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from ddpo.app.device import device
from ddpo.app.frame import build
from ddpo.app.shelf import Shelf
from ddpo.shots import Shot
from ddpo.studio import Studio
from tests.test_studio import save_run

ASKED = {
    "run": "tuned", "prompt": "a cat", "seed": 3, "steps": 4, "guidance": 2.0, "scale": 1.0, "iteration": 2,
    "scorers": ["jpeg:Compressibility"],
}  # fmt: skip
ORDER = list(ASKED)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    save_run(root / "tuned", tiny)
    (root / "no_model").mkdir()
    config = (root / "tuned" / "config.yaml").read_text()
    (root / "no_model" / "config.yaml").write_text(config.replace(str(tiny), "some/where"))
    return root


@pytest.fixture(scope="module")
def page(runs):
    page = build(Shelf(runs))
    page.queue(max_size=64).launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield page
    page.close()


@pytest.fixture(scope="module")
def client(page):
    return Client(page.local_url, verbose=False)


def running(page):
    return page._queue.event_queue_per_concurrency_id["device"].current_concurrency


def eventually(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def test_generate_returns_base_and_tuned_and_the_verdicts(client, runs):
    (base, tuned), verdicts, said = client.predict(**ASKED, api_name="/generate")
    shot = Shot("a cat", 3, 4, 2.0, 1.0, 2)
    expected = Studio.open(runs / "tuned").draw([shot.base, shot]).permute(0, 2, 3, 1).numpy()
    for path, pixels in zip((base, tuned), expected, strict=True):
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.info == {} and np.array_equal(np.asarray(picture), pixels)
    assert [row["scorer"] for row in verdicts] == ["jpeg:Compressibility"] and "Seed 3, 4 steps" in said
    scores = client.predict(
        run="tuned", picture=handle_file(tuned), prompt="a cat", scorers=["jpeg:Compressibility"], api_name="/score"
    )[0]
    assert float(scores[0]["score"]) == pytest.approx(float(verdicts[0]["tuned"]), rel=1e-3)
    assert scores[0]["range"] == "kB, below zero" and "JPEG size" in scores[0]["measures"]


def test_a_generation_tells_each_denoising_step(client):
    job = client.submit(**ASKED, api_name="/generate")
    job.result()
    told = [said for *_, said in job.outputs()]
    assert [said for said in told if said.startswith("Drawing: ")] == [f"Drawing: step {i} of 8" for i in range(1, 9)]


def test_a_grid_is_one_png_and_a_csv(client):
    words = {"kind": "LoRA scale x iteration", "across": "0, 1", "down": "1, 2"}
    png, table, said = client.predict(**ASKED, **words, api_name="/grid")
    with Image.open(png) as picture:
        assert picture.format == "PNG" and picture.info == {}
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["scale"], row["iteration"]) for row in rows] == [("0.0", "1"), ("1.0", "1"), ("0.0", "2"), ("1.0", "2")]
    scores = [float(row["jpeg:Compressibility"]) for row in rows]
    assert scores[0] == scores[2] and scores[1] != scores[3] and said == "4 pictures."
    with pytest.raises(AppError, match="9 x 8 = 72 pictures; a grid has at most 64"):
        client.predict(**ASKED, **words | {"across": "0,.1,.2,.3,.4,.5,.6,.7,.8", "down": "0-7"}, api_name="/grid")


WRONG = {
    "a run that is not there": ({"run": "../tuned"}, "there is no run"),
    "no run": ({"run": None}, "there is no run"),
    "a list for a prompt": ({"prompt": ["a cat"]}, "must be a text"),
    "no prompt": ({"prompt": ""}, "empty"),
    "a long prompt": ({"prompt": "x" * 10_000}, "10,000 characters; at most 2,000"),
    "NUL": ({"prompt": "a\x00b"}, "control character"),
    "half a surrogate pair": ({"prompt": "a\ud800"}, "control character"),
    "a seed below zero": ({"seed": -1}, "from 0 to 2147483647"),
    "a huge seed": ({"seed": 1e300}, "from 0 to 2147483647"),
    "no seed": ({"seed": None}, "from 0 to 2147483647"),
    "too many steps": ({"steps": 10**9}, "from 1 to 200"),
    "steps as text": ({"steps": "4"}, "from 1 to 200"),
    "too much guidance": ({"guidance": 31}, "from 0 to 30"),
    "too large a scale": ({"scale": 1.51}, "from 0 to 1.5"),
    "an iteration that was not saved": ({"iteration": 7}, "it holds 0, 1, 2"),
    "a scorer that is not the run's": ({"scorers": ["pickscore"]}, "choose from jpeg:Compressibility"),
    "scorers that are no names": ({"scorers": [{}]}, "list of names"),
    "a model that is not there": ({"run": "no_model"}, "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_with_what_may_be(name, page, capfd):
    """Sent as JSON by hand, for the client's own library would not send all of it."""
    changes, words = WRONG[name]
    data = json.dumps({"data": [(ASKED | changes)[key] for key in ORDER]})
    url, headers = f"{page.local_url}gradio_api/call/generate", {"content-type": "application/json"}
    event = httpx2.post(url, content=data, headers=headers).json()["event_id"]
    answer = httpx2.get(f"{url}/{event}", timeout=60).text
    assert "event: error" in answer and words in answer, answer
    assert "Traceback" not in capfd.readouterr().err
    assert eventually(lambda: running(page) == 0)


def test_a_file_that_is_no_picture_is_told(client, tmp_path):
    (tmp_path / "a.png").write_bytes(b"GIF89a and so on")
    asked = {"run": "tuned", "prompt": "a cat", "scorers": ["pixels:Contrast"]}
    with pytest.raises(AppError, match="not a whole PNG, JPEG or WebP"):
        client.predict(**asked, picture=handle_file(tmp_path / "a.png"), api_name="/score")
    with pytest.raises(AppError, match="drop a picture first"):
        client.predict(**asked, picture=None, api_name="/score")


def test_a_scorer_whose_weights_are_missing_says_so_beside_those_that_work(client, runs, tiny):
    config = (runs / "tuned" / "config.yaml").read_text()
    save_run(runs / "watched", tiny)
    entry = "held_out_rewards:\n- {name: clip, model: 'local-dir:nowhere'}\n"
    (runs / "watched" / "config.yaml").write_text(config.replace("held_out_rewards: []\n", entry))
    scorers = ["jpeg:Compressibility", "clip (held out)"]
    verdicts = client.predict(**ASKED | {"run": "watched", "scorers": scorers}, api_name="/generate")[1]
    assert verdicts[0]["trouble"] == "" and "nowhere" in verdicts[1]["trouble"]


def test_a_closed_page_ends_its_work_and_the_next_is_served(page, client, runs):
    """The stream is left while the event is drawing, as a closed page leaves it; what waits in the queue is dropped too."""
    steps = []
    hook = device().studio(runs / "tuned").policy.network.register_forward_pre_hook(lambda *_: steps.append(1))
    data = [(ASKED | {"steps": 200})[key] for key in ORDER]
    try:
        for session in ("gone", "gone too"):
            body = {"data": data, "fn_index": function(page, "generate"), "session_hash": session}
            assert httpx2.post(f"{page.local_url}gradio_api/queue/join", json=body).status_code == 200
            stream = httpx2.stream(
                "GET", f"{page.local_url}gradio_api/queue/data", params={"session_hash": session}, timeout=60
            )
            with contextlib.ExitStack() as stack:
                response = stack.enter_context(stream)
                for line in response.iter_lines():
                    if "Drawing: step 2 " in line:
                        break
            assert eventually(lambda: running(page) == 0)
            assert client.predict(**ASKED, api_name="/generate")[2].startswith("Seed 3")
            assert len(steps) < 150  # of 400
            steps.clear()
    finally:
        hook.remove()


def function(page, name):
    return next(i for i, f in page.fns.items() if f.api_name == name)


def test_the_endpoints_have_names_and_named_arguments(client):
    found = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {"/generate", "/grid", "/score"} <= found.keys()
    assert [p["parameter_name"] for p in found["/generate"]["parameters"]] == ORDER
