"""A page whose drawing is a sleep, served as the app is, and watched: `python -m tests.hardened_page --port 0`.

What the process connects to, binds or looks up is printed as a line that begins with WATCHED.
"""

import argparse
import sys
import threading
import time


def watch(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class"):
        print("WATCHED", event, args[1:] if event != "socket.getaddrinfo" else args, flush=True)


sys.addaudithook(watch)

import gradio as gr  # noqa: E402

from ddpo.app import serve  # noqa: E402

LOCK, COUNTS = threading.Lock(), {"running": 0, "most": 0, "steps": 0}


def draw(prompt: str, seed: float, steps: float):
    """`steps` naps; ends with what it was asked for."""
    if not isinstance(prompt, str) or len(prompt) > 2000 or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise gr.Error("a prompt of at most 2000 characters and a seed in 0..2147483647, please", print_exception=False)
    if not isinstance(steps, int) or not 1 <= steps <= 200:
        raise gr.Error("steps must be in 1..200", print_exception=False)
    with LOCK:
        COUNTS["running"] += 1
        COUNTS["most"] = max(COUNTS["most"], COUNTS["running"])
    try:
        for i in range(steps):
            time.sleep(0.02)
            COUNTS["steps"] += 1
            yield f"step {i}"
        yield f"{prompt} {seed}"
    finally:
        with LOCK:
            COUNTS["running"] -= 1


def build(args: argparse.Namespace) -> gr.Blocks:
    with gr.Blocks() as page:
        prompt, seed, steps, out = gr.Textbox(), gr.Number(precision=0), gr.Number(precision=0), gr.Textbox()
        gr.Button().click(draw, [prompt, seed, steps], out, api_name="draw", concurrency_limit=1, concurrency_id="device")
        counts, picture, size = gr.JSON(), gr.Image(type="pil"), gr.JSON()
        gr.Button().click(lambda: dict(COUNTS), None, counts, api_name="counts")
        gr.Button().click(lambda picture: picture and list(picture.size), picture, size, api_name="size")
    return page


if __name__ == "__main__":
    sys.exit(serve.main(argparse.ArgumentParser(), sys.argv[1:], build))
