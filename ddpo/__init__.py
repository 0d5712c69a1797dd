"""Tunes text-to-image diffusion models by reinforcement learning.

Nothing of ours reports on its users. What the libraries do is turned off here, before any of them is imported, for every way
of starting the program; a user who has set one of these keeps his own.
"""

import os

DEFAULTS = {
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",  # pipelines that come with code of their own (CVE-2026-44513) are not run
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
