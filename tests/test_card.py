"""The model card: its numbers are the run's, and no prompt or name becomes markup. Run: pytest tests/test_card.py"""

import json
import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from ddpo import jsonl
from ddpo.card import escaped, fenced, line, write_card
from ddpo.runs import Run
from tests.test_report import evaluation, finished, save

WORST = [
    "<script>alert(1)</script> | x\n---\n# head ![p](http://example.com/p.png) <img src=x> {}",
    '"quoted": [a, b] \u2028\x1b[2J\ud800 `code` **bold** $name ${{x}} www.example.com a@b.co {}',
    "- item\r\n```\n</details> \\| [link](http://example.com) \U0001f600 {}",
]


def card(folder, iteration=4):
    path = write_card(Run.load(folder), folder, iteration)
    text = path.read_text("utf-8")
    return text, ModelCard(text)


def told(folder, **facts):
    known = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(known | facts))


def rendered(text):
    """As the hub renders it: the front matter is gone, tables are tables."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("\n---\n", 1)[1])


@pytest.mark.parametrize("worst", WORST)
def test_prompts_and_names_stay_text(tmp_path, worst):
    folder = finished(tmp_path / "run", prompt=worst, count=4)
    told(folder, name=worst, model=worst, algorithm=worst, command=worst, rewards=[worst], held_out_rewards=[])
    jsonl.append(
        folder / "metrics.jsonl", {"iteration": 4, f"reward/{worst}/mean": 1.0, **evaluation(4, {worst: (0, 1, 0.5, 2)})}
    )
    jsonl.truncate(folder / "metrics.jsonl", lambda m: m["iteration"] != 4 or f"reward/{worst}/mean" in m)
    text, parsed = card(folder)
    assert parsed.data.widget and all(w.example["text"] == line(worst.format(i)) for i, w in enumerate(_widgets(parsed)))
    html = re.sub(r"<pre>.*?</pre>", "", rendered(text), flags=re.S)  # code is shown as it stands
    assert "<script" not in html and 'src="http' not in html and 'src="x"' not in html
    assert 'href="http' not in html and "<strong>bold" not in html and html.count("<h1>") == 1
    assert len(re.findall("<tr>", html)) == 2 + 3  # the scores' row and the two prompts', each below a head
    shown = re.sub(r"<[^>]*>", "", html)
    assert _plain(line(worst.format(0))) in _plain(shown)


def _widgets(parsed):
    return [type("Widget", (), {"example": w})() for w in parsed.data.widget]


def _plain(text):
    return re.sub(r"&\w+;|\W", "", text)


def test_the_front_matter_names_a_base_model_only_where_the_hub_has_one(tmp_path):
    folder = finished(tmp_path / "run")
    assert card(folder)[1].data.to_dict().get("base_model") is None
    told(folder, model="stable-diffusion-v1-5/stable-diffusion-v1-5", revision="abc")
    text, parsed = card(folder)
    data = parsed.data.to_dict()
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5" and data["library_name"] == "diffusers"
    assert "template:sd-lora" in data["tags"] and 'revision="abc"' in text
    told(folder, model=str(tmp_path / "secret" / "models" / "mine"))
    text, parsed = card(folder)
    assert "secret" not in text and "A LoRA for mine," in text and parsed.data.to_dict().get("base_model") is None


def test_the_pictures_are_copies_of_the_first_prompts_and_an_old_cards_are_gone(tmp_path):
    folder = finished(tmp_path / "run", count=16)
    (folder / "images").mkdir()
    (folder / "images" / "pair-9-base.png").write_bytes(b"old")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.webp")
    index = folder / "samples" / "index.jsonl"  # of the second prompt
    index.write_text(index.read_text().replace("samples/iteration_0004/0002.webp", "../outside.webp"))
    text, parsed = card(folder)
    names = sorted(p.name for p in (folder / "images").glob("*.png"))
    assert names == [f"pair-{i}-{side}.png" for i in (1, 3, 4) for side in ("base", "tuned")]
    assert all(f"images/{name}" in text for name in names)
    assert [w["output"]["url"] for w in parsed.data.widget] == [f"images/pair-{i}-tuned.png" for i in (1, 3, 4)]
    small, large = Image.open(folder / "samples" / "iteration_0000" / "0000.webp"), Image.open(folder / "images" / names[0])
    assert large.size == (192, 192) and large.getpixel((4, 4)) == small.getpixel((1, 1))
    for svg in (folder / "images").glob("curve-*.svg"):
        assert svg.read_text().startswith("<svg xmlns=")
    assert text.count("curve-") == 2


def test_its_numbers_are_those_of_the_iteration_that_the_lora_is_of(tmp_path):
    folder = finished(tmp_path / "run")
    text, _ = card(folder)
    assert "| scene | yes | 0.500 | 0.600 | +0.100 \\[+0.042, +0.158\\] | higher |" in text
    assert "| clip | no | 0.200 | 0.190 |" in text and "71.0 % of the pairs" in text
    earlier, _ = card(folder, 2)
    assert "After 2 iterations" in earlier and "no pictures of this iteration" in earlier
    never, _ = card(folder, 3)
    assert "was not evaluated" in never and "| scene" not in never and "0.600" not in never


def test_what_the_run_lost_is_said_in_its_own_numbers(tmp_path):
    folder = finished(tmp_path / "run")
    text, _ = card(folder)
    assert "No scorer that was held out fell" in text and "90.3 % of the base model's" in text
    scorers = {"scene": (0.5, 0.6, 0.05, 0.2), "clip": (0.8, 0.3, -0.6, -0.4)}
    jsonl.truncate(folder / "metrics.jsonl", lambda m: m["iteration"] < 4)
    alarms = [{"name": "hacking", "level": "stop", "text": "clip fell <b>far</b>"}]
    final = {"iteration": 4, "reward/scene/mean": 1.0, "alarms": alarms, **evaluation(4, scorers)}
    jsonl.append(folder / "metrics.jsonl", final)
    text, _ = card(folder)
    assert "**clip fell** 0.800 → 0.300 (-0.500 \\[-0.600, -0.400\\])" in text and "the reward is gamed" in text
    assert "Alarm: clip fell \\<b\\>far\\</b\\>" in text and "No scorer that was held out fell" not in text
    jsonl.truncate(folder / "metrics.jsonl", lambda m: m["iteration"] < 4)
    jsonl.append(folder / "metrics.jsonl", {**final, **evaluation(4, {}), "alarms": []} | {"eval/clip/delta": None})
    jsonl.truncate(folder / "metrics.jsonl", lambda m: m["iteration"] < 4)
    jsonl.append(
        folder / "metrics.jsonl", {"iteration": 4, "reward/scene/mean": 1.0, **evaluation(4, {"scene": (0, 1, 0.5, 2)})}
    )
    assert "No scorer was held out" in card(folder)[0]


def test_licences_are_those_of_our_scorers_and_no_other_module_is_imported(tmp_path):
    folder = finished(tmp_path / "run")
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    told(folder, rewards=["clip", f"{tmp_path}/evil.py:Evil"], held_out_rewards=["os:system"])
    text, _ = card(folder)
    assert "clip: " in text and "licence" in text.partition("## Licences")[2]
    assert text.partition("## Licences")[2].count("not known to ddpo") == 2


def test_a_bare_folder_has_a_card(tmp_path):
    save(tmp_path, 0, count=2)
    text, parsed = card(tmp_path)
    assert "not recorded" in text and parsed.data.library_name == "diffusers" and parsed.data.to_dict().get("widget") is None


def test_escaping():
    assert escaped("a_b|c\nd") == "a\\_b\\|c d" and escaped("www.x.y") == "www\\.x.y"
    block = fenced("a\n````\nb", "bash")
    assert block.startswith("`````bash\n") and block.endswith("\n`````")
