"""Pages that need nothing but themselves: an HTML file in assets/ with named parts, filled in so that text stays text.

The file holds the page and, each after a line `<!-- part: NAME -->`, the parts that it is made of; placeholders are those
of `string.Template`. Whatever is filled in (prompts, names, commands) is escaped; only `Html` is not.
"""

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from pathlib import Path
from string import Template

_PART = re.compile(r"^<!-- part: (\w+) -->\n", re.M)


class Html(str):
    """Text that is markup already."""


class Page:
    """The parts of one file in ddpo/assets."""

    def __init__(self, name: str):
        text = (Path(__file__).parent / "assets" / name).read_text("utf-8")
        first, *rest = _PART.split(text)
        self.parts = {"page": first} | dict(zip(rest[::2], rest[1::2], strict=True))

    def fill(self, part: str, **values: object) -> Html:
        """A part with its placeholders filled in. A placeholder without a value is a KeyError."""
        filling = {name: v if isinstance(v, Html) else html.escape(str(v)) for name, v in values.items()}
        return Html(Template(self.parts[part]).substitute(filling))

    def source(self, part: str) -> str:
        """How a content security policy allows this part, a script, and no other."""
        return "sha256-" + base64.b64encode(hashlib.sha256(self.parts[part].encode()).digest()).decode()


def join(items: Iterable[Html]) -> Html:
    return Html("".join(items))
