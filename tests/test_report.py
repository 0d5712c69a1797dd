"""The run folder's records and its page. Run: pytest tests/test_report.py"""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo import report
from ddpo.figures import HEIGHT, LEFT, WIDTH, Alarm, Curve, alarms, chart, comparisons
from ddpo.runs import webp

EVIL = "<script>alert(1)</script> \"a\" & 'b' $name http://example.com/x.png \x1b[2J \ud800"
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Reader(HTMLParser):
    """Reads a page; knows what it loads, what it says, which scripts it runs, and whether its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.said, self.scripts, self.pictures = [], [], [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.pictures += tag == "img"
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]
        assert not any(k.startswith("on") for k, _ in attrs), "an inline handler"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # only SVG has these
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.said).append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.said))


def evaluation(iteration, scorers):
    """{scorer: (base, tuned, delta_low, delta_high)} as an evaluation's share of a line of metrics."""
    line = {"eval/win_rate": 0.71, "eval/diversity/base": 0.31, "eval/diversity/tuned": 0.28}
    for name, (base, tuned, low, high) in scorers.items():
        line |= {f"eval/{name}/base": base, f"eval/{name}/tuned": tuned, f"eval/{name}/delta": tuned - base}
        line |= {f"eval/{name}/delta_low": low, f"eval/{name}/delta_high": high}
    return line


def save(folder, iteration, size=64, count=16, prompt="a cat {}", gain=lambda i: 0.1):
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(iteration))
    prompts = [prompt.format(i // 2) for i in range(count)]
    scores = {"scene": [0.5 + (iteration > 0) * gain(i) for i in range(count)], "clip": [None] * count}
    return images, report.save_samples(folder, iteration, images, prompts, [i % 2 for i in range(count)], scores)


def finished(folder, **samples):
    """A run folder with everything in it."""
    facts = {
        "name": "owls", "status": "finished", "command": "accelerate launch -m ddpo.train x.yaml", "seed": 3, "model": "toy",
        "started": "2026-11-21T09:00:00+00:00", "ended": "2026-11-21T09:10:00+00:00", "exit_reason": None, "world_size": 2,
        "resume_command": "accelerate launch -m ddpo.train x.yaml run.output=runs/owls", "rewards": ["scene:Scene"],
        "held_out_rewards": ["clip:CLIP"], "versions": {"torch": "2.13.0"},
        "prompts": {"train": {"path": "train.txt", "sha256": "ab" * 32}, "held_out": {"path": "held.txt", "sha256": "cd" * 32}},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text("algorithm:\n  name: nft\n  beta: 1.0\nrewards:\n- name: scene\nrun:\n  seed: 3\n")
    scorers = {"scene": (0.5, 0.6, 0.0417, 0.1583), "clip": (0.2, 0.19, -0.0312, 0.0112)}
    same = {"scene": (0.5, 0.5, 0.0, 0.0), "clip": (0.2, 0.2, 0.0, 0.0)}
    report.append(folder / "metrics.jsonl", {"iteration": 0, "images": 0, "seconds": 4.0, **evaluation(0, same)})
    for k in range(1, 5):
        line = {
            "iteration": k, "images": 64 * k, "seconds": 100.0 * k, "reward/mean": 0.5 + k / 40, "reward/std": 0.2, "lr": 1e-4,
            "reward/scene/mean": 0.5, "kl/step_nats": k / 1000, "clip_fraction": 0.1, "grad_norm": 1.5,
        }  # fmt: skip
        report.append(folder / "metrics.jsonl", line | (evaluation(k, scorers) if k % 2 == 0 else {}))
    save(folder, 0, **samples)
    save(folder, 4, **samples)
    return folder


def page(folder):
    path = report.write_report(folder)
    return Reader(path.read_text("utf-8")), path


# --- records


def test_a_record_comes_back_and_what_is_no_number_is_null(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    report.append(path, {"a": 1.5, "b": float("nan"), "c": [float("inf"), 2], "d": {"e": -float("inf")}, "f": "ü\n"})
    report.append(path, {"a": 2})
    assert report.read(path) == [{"a": 1.5, "b": None, "c": [None, 2], "d": {"e": None}, "f": "ü\n"}, {"a": 2}]
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_does_not_count_and_the_next_record_is_whole(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    report.append(path, {"a": 1})
    report.append(path, {"b": "ü\u2028"})
    path.write_bytes(path.read_bytes()[:-cut])
    assert report.read(path) == [{"a": 1}]
    report.append(path, {"c": 3})
    assert report.read(path) == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize("damage", [b"{", b"", b"[1]", b"\xff\xfe", b"\0\0\0", b'{"a": 1}{"b": 2}'])
def test_other_damage_is_told_with_its_line(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n' + damage + b'\n{"c": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        report.read(path)


def test_truncate_keeps_what_is_asked_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    report.truncate(path, lambda _: False)
    assert not path.exists() and report.read(path) == []
    for k in range(5):
        report.append(path, {"iteration": k})
    path.write_bytes(path.read_bytes() + b'{"iterat')
    report.truncate(path, lambda record: record["iteration"] <= 2)
    assert path.read_bytes() == b'{"iteration": 0}\n{"iteration": 1}\n{"iteration": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- samples


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: x.numpy(), lambda x: x.to(torch.float64).requires_grad_()])
def test_pictures_round_trip_exactly(tmp_path, kind):
    images = torch.rand(3, 3, 20, 28)
    saved = report.save_samples(tmp_path, 7, kind(images), ["a", "../b", "c"], [1, 2, 3], {"s": [0.5, None, float("nan")]})
    wanted = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, sample in enumerate(saved):
        assert sample.path == f"samples/iteration_0007/{i:04d}.webp"
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / sample.path)), wanted[i])
    index = report.read(tmp_path / "samples" / "index.jsonl")
    assert [(s["iteration"], s["prompt"], s["seed"], s["scores"]["s"]) for s in index] == [
        (7, "a", 1, 0.5), (7, "../b", 2, None), (7, "c", 3, None),
    ]  # fmt: skip


def test_an_iteration_saved_again_replaces_its_entries(tmp_path):
    for iteration, count in ((0, 4), (2, 6), (2, 4)):
        save(tmp_path, iteration, size=8, count=count)
    index = report.read(tmp_path / "samples" / "index.jsonl")
    assert [s["iteration"] for s in index] == [0] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("images", "prompts", "told"),
    [
        (torch.rand(2, 3, 8, 8), ["a"], "'prompts': 1"),
        (torch.rand(1, 8, 8, 3), ["a"], r"\(1, 8, 8, 3\)"),
        (torch.rand(1, 3, 8, 8) * 2 - 1, ["a"], r"\[0, 1\]"),
        (torch.full((1, 3, 8, 8), torch.nan), ["a"], r"\[0, 1\]"),
    ],
)
def test_wrong_pictures_are_refused_before_anything_is_written(tmp_path, images, prompts, told):
    with pytest.raises(ValueError, match=told):
        report.save_samples(tmp_path, 0, images, prompts, [0] * len(images), {})
    assert list(tmp_path.iterdir()) == []


def test_a_grid_shows_every_pair_with_the_base_above(tmp_path):
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])  # base red, tuned blue
    for iteration, colour in zip((0, 3), colours, strict=True):
        images = colour.view(1, 3, 1, 1).expand(5, 3, 16, 16)
        report.save_samples(tmp_path, iteration, images, [f"p {i}" for i in range(5)], [0] * 5, {})
    sheet = np.asarray(report.grid(tmp_path, 3, columns=3)).astype(int)
    red, blue = ((sheet == np.array(c)).all(2) for c in ((255, 0, 0), (0, 0, 255)))
    assert red.sum() == blue.sum() == 5 * 192 * 192
    assert np.argwhere(red)[0][0] < np.argwhere(blue)[0][0]
    with pytest.raises(ValueError, match=r"iteration 2; it holds iterations \[0, 3\]"):
        report.grid(tmp_path, 2)


# --- the page


def test_the_page_is_whole_loads_nothing_and_runs_only_its_own_script(tmp_path):
    reader, path = page(finished(tmp_path / "run"))
    assert reader.open == [] and reader.pictures == 16
    assert all(source.startswith("data:image/webp;base64,") for source in reader.loads)
    text = path.read_text("utf-8")
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text and "script-src 'sha256-" in text and len(reader.scripts) == 1


def test_the_page_can_be_read_aloud(tmp_path):
    _, path = page(finished(tmp_path / "run"))
    text = path.read_text("utf-8")
    assert '<html lang="en">' in text and "<title>owls: tuned for scene</title>" in text and 'name="viewport"' in text
    assert re.findall(r"<h1>|<h2|<h3>", text)[:2] == ["<h1>", "<h2"]
    for tag, names in (("img", "alt"), ('svg class="chart"', "aria-label"), ('input class="cut"', "aria-label")):
        found = re.findall(f"<{tag} [^>]*>", text)
        assert found and all(re.search(f'{names}="[^"]+"', one) for one in found)
    assert text.count('type="radio"') == text.count("<label><input")


def test_text_from_outside_stays_text(tmp_path):
    folder = finished(tmp_path / "run", prompt=EVIL + " {}", count=4)
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(
        json.dumps(dict.fromkeys(facts, EVIL) | {"rewards": [EVIL], "prompts": {}, "versions": {}})
    )
    (folder / "config.yaml").write_text("rewards: <script>alert(1)</script>\n")
    report.append(folder / "metrics.jsonl", {"iteration": 5, **evaluation(5, {EVIL: (0.0, 1.0, 0.5, 1.5)})})
    reader, path = page(folder)
    assert len(reader.scripts) == 1 and "alert" not in reader.scripts[0]
    assert "<script>alert(1)</script>" in reader.text and "<script>alert" not in path.read_text("utf-8")
    assert all(source.startswith("data:") for source in reader.loads)


def test_the_page_stays_under_five_megabytes(tmp_path):
    """Of 64 small pairs, and of large pictures of pure noise, which nothing compresses."""
    reader, path = page(finished(tmp_path / "run", count=64, gain=lambda i: i - 20))
    assert reader.pictures == 2 * (report.GAINS + report.LOSSES) and path.stat().st_size < 1_000_000
    assert reader.pictures * report.PICTURE_BYTES * 4 / 3 < 4_000_000  # the rest is less than a megabyte
    _, (noise, *_) = save(tmp_path, 0, size=512, count=1)
    content, size = webp(tmp_path / noise.path, report.PICTURE_BYTES)
    assert len(content) <= report.PICTURE_BYTES and Image.open(io.BytesIO(content)).size == size and min(size) >= 256


def test_a_small_picture_is_in_the_page_as_it_was_saved(tmp_path):
    _, (sample, *_) = save(tmp_path, 0)
    assert webp(tmp_path / sample.path, report.PICTURE_BYTES) == ((tmp_path / sample.path).read_bytes(), (64, 64))


def test_the_numbers_shown_are_the_numbers_measured(tmp_path):
    reader, _ = page(finished(tmp_path / "run"))
    assert "scene went 0.500 → 0.600: +0.100 [+0.042, +0.158]" in reader.text
    for shown in (
        "0.200 → 0.190",
        "-0.0100 [-0.0312, +0.0112] no clear change",
        "71.0 % of pairs",
        "0.310 → 0.280",
        "0.00400 nats",
    ):
        assert shown in reader.text
    trained, held_out = reader.text.index("Trained on"), reader.text.index("never trained on")
    assert trained < reader.text.index("+0.100 [+0.042, +0.158] higher") < held_out < reader.text.index("no clear change")


def test_pairs_are_sorted_by_gain_and_losses_are_not_hidden(tmp_path):
    gains = [0.3, -0.2, 0.0, 0.1, -0.4, 0.2] + [0.01] * 10
    reader, _ = page(finished(tmp_path / "run", gain=gains.__getitem__))
    changes = re.findall(r"scene 0\.500 0\.\d+ ([+-]0\.\d+)", reader.text)
    assert changes == ["+0.300", "+0.200", "+0.100", *["+0.010"] * 5, "-0.400", "-0.200"]
    assert "16 pairs" in reader.text and "13 gained, 2 lost, 1 stayed as they were" in reader.text


def test_a_run_that_has_just_begun_has_a_page_that_says_so(tmp_path):
    reader, _ = page(tmp_path)
    for missing in (
        "run.json is missing",
        "config.yaml is missing",
        "no iteration yet",
        "not been evaluated",
        "no sample pictures",
    ):
        assert missing in reader.text
    report.append(tmp_path / "metrics.jsonl", {"iteration": 0, **evaluation(0, {"scene": (0.5, 0.5, 0.0, 0.0)})})
    report.append(tmp_path / "metrics.jsonl", {"iteration": 1, "reward/mean": 0.5, "reward/std": None})
    (tmp_path / "run.json").write_text('{"status": "running", "ended": null}')
    reader, _ = page(tmp_path)
    assert "had not ended" in reader.text and "The tuned model has not been evaluated" in reader.text
    assert "no iteration yet" not in reader.text and "Training reward" in reader.text


def test_alarms_are_marked_on_every_curve_and_said_once(tmp_path):
    folder = finished(tmp_path / "run")
    lines = report.read(folder / "metrics.jsonl")
    warned = {"name": "diversity", "level": "warn", "text": "alike <b>x</b>, 1"}
    lines[2]["alarms"] = [warned]
    lines[3]["alarms"] = [warned | {"text": "alike, 2"}, {"name": "hacking", "level": "stop", "text": "clip fell"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader, path = page(folder)
    text = path.read_text("utf-8")
    charts = text.count('<svg class="chart"')
    assert charts == 7 and text.count('class="mark warn"') == charts and text.count('class="mark stop"') == charts
    assert "Alarms fired while it ran: diversity, hacking." in reader.text
    listed = (
        reader.text.index("hacking stop, iteration 3 clip fell"),
        reader.text.index("diversity warn, iteration 2 and 1 more"),
    )
    assert listed == tuple(sorted(listed)) and "<b>x" not in text and "alike, 2" in reader.text
    assert alarms(lines) == [
        Alarm("diversity", "warn", "alike, 2", [2, 3]), Alarm("hacking", "stop", "clip fell", [3]),
    ]  # fmt: skip


def test_the_page_prints_both_pictures_and_its_colours_can_be_read(tmp_path):
    _, path = page(finished(tmp_path / "run"))
    css = re.search(r"<style>(.*?)</style>", path.read_text("utf-8"), re.S)[1]
    slider = re.search(r"@media screen \{(.*?)\n\}", css, re.S)[1]
    assert "clip-path" in slider and css.count("clip-path") == 1  # on paper nothing is cut: both stand side by side
    light, dark, paper = (dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S))
    for colours in (light, dark, paper):
        grounds = [colours["paper"], colours["sheet"]]
        for ink in ("ink", "quiet", "tuned", "gain", "loss"):
            assert min(contrast(colours[ink], ground) for ground in grounds) >= 4.5, ink
        for mark in ("base", "warn"):
            assert min(contrast(colours[mark], ground) for ground in grounds) >= 3, mark
        assert contrast(colours["ink"], colours["note"]) >= 4.5


def contrast(one, other):
    """WCAG 2.2: the ratio of two colours' relative luminances."""

    def luminance(colour):
        full = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_picture_that_is_gone_leaves_the_rest(tmp_path):
    folder = finished(tmp_path / "run", count=4)
    (folder / "samples" / "iteration_0004" / "0001.webp").unlink()
    (folder / "samples" / "iteration_0004" / "0002.webp").write_bytes(b"RIFF")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.webp")
    index = (folder / "samples" / "index.jsonl").read_text()
    (folder / "samples" / "index.jsonl").write_text(index.replace("samples/iteration_0004/0003.webp", "../outside.webp"))
    reader, _ = page(folder)
    assert reader.pictures == 8 - 3 and reader.text.count("picture missing or unreadable") == 3


def test_a_long_run_makes_a_small_page(tmp_path):
    lines = [
        {"iteration": k, "reward/mean": k % 7 / 7, "reward/std": 0.1, **evaluation(k, {"scene": (0.1, 0.2, 0.0, 0.2)})}
        for k in range(5000)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.write_report(tmp_path).stat().st_size < 200_000


def test_evaluations_are_read_from_metrics():
    (found,) = comparisons(evaluation(1, {"my/scorer": (1.0, 3.0, 1.5, 2.5)}))
    assert (found.scorer, found.base, found.tuned, found.delta, found.low, found.high) == ("my/scorer", 1.0, 3.0, 2.0, 1.5, 2.5)
    three = {"a": (0, 1, 0.1, 2), "b": (0, -1, -2, -0.1), "c": (0, 1, -1, 3)}
    assert [c.verdict for c in comparisons(evaluation(1, three))] == ["higher", "lower", "no clear change"]


@pytest.mark.parametrize(
    "values", [[0], [2.5], [-3, -3], [0.3, 0.3 + 1e-16], [1e-9, 2e-9, 4e-9], [-1e6, 5, 1e6], [0, 1e-300], [1, 3, 2] * 200]
)
def test_a_chart_holds_every_point_and_higher_is_higher(values):
    drawing = chart("x", [Curve("x", "tuned", [(float(i), v, v - abs(v), v) for i, v in enumerate(values)])])
    (line,) = re.findall(r'<polyline class="line tuned" points="([^"]*)"', drawing)
    points = [tuple(map(float, p.split(","))) for p in line.split()]
    assert all(LEFT <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    if len(values) < 10:
        order = sorted(range(len(values)), key=values.__getitem__)
        assert [points[i][1] for i in order] == sorted((y for _, y in points), reverse=True)


def test_reading_a_run_needs_no_torch():
    """The app browses runs where none is installed, and starts in no time."""
    program = "import sys, ddpo.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
