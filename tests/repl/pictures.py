"""A terminal that shows pictures: it answers what it is asked and decodes what it is sent."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image

from tests.repl.terminals import ChatTerminal

_STRINGS = re.compile(r"\x1b_G(.*?)\x1b\\|\x1bP(.*?)\x1b\\|\x1b\]1337;File=(.*?)\x07", re.DOTALL)
_ASKED = "\x1b[c"
_VERSION = "\x1b[>q"

KITTY = "\x1b_Gi=31;OK\x1b\\\x1b[6;18;9t\x1b[?62;c"
ITERM2 = "\x1bP>|iTerm2 3.5.14\x1b\\\x1b[6;17;8t\x1b[?62;4;22c"
SIXEL = "\x1b[6;16;8t\x1b[?1;0;256S\x1b[?62;4;22c"
PLAIN = "\x1b[?62;22c"


class PictureTerminal(ChatTerminal):
    """Gives `reply` to the questions; pictures lie in `kitty`, `iterm2` and `sixels`."""

    def __init__(self, *arguments, reply: str, **options) -> None:
        self.reply = reply
        self.is_asked = False
        self.kitty: list[tuple[dict[str, str], Image.Image]] = []
        self.iterm2: list[tuple[dict[str, str], Image.Image]] = []
        self.sixels: list[Image.Image] = []
        self._held = ""
        self._payload = ""
        self._keys: dict[str, str] = {}
        super().__init__(*arguments, thumbnails="auto", **options)

    def write(self, text: str) -> None:
        """Take escape strings out, which pyte would print, and answer the questions once."""
        text = _STRINGS.sub(self._keep, self._held + text)
        start = max(map(text.rfind, ("\x1b_", "\x1bP", "\x1b]1337")))
        text, self._held = (text[:start], text[start:]) if start >= 0 else (text, "")
        if _ASKED in text and not self.is_asked:
            self.is_asked = True
            self.child.send(self.reply)
        super().write(text.replace(_ASKED, "").replace(_VERSION, ""))

    def _keep(self, found: re.Match[str]) -> str:
        if found[2] is not None:
            self.sixels.append(decoded_sixels(found[2]))
            return ""
        if found[3] is not None:
            head, _, payload = found[3].partition(":")
            data = base64.b64decode(payload, validate=True)
            keys = dict(pair.split("=") for pair in head.split(";"))
            assert (keys["inline"], int(keys["size"])) == ("1", len(data))
            self.iterm2.append((keys, Image.open(io.BytesIO(data))))
            return ""
        head, _, payload = found[1].partition(";")
        keys = dict(pair.split("=") for pair in head.split(","))
        if keys.get("a") == "q":
            return ""
        assert len(payload) <= 4096
        assert keys["q"] == "2"
        self._keys = self._keys or keys
        self._payload += payload
        if keys["m"] == "0":
            picture = Image.open(io.BytesIO(base64.b64decode(self._payload, validate=True)))
            self.kitty.append((self._keys, picture))
            self._payload, self._keys = "", {}
        return ""


def decoded_sixels(data: str) -> Image.Image:
    """What is between DCS and ST as a picture; written after the VT340 manual."""
    raster = re.match(r'[\d;]*q"(\d+);(\d+);(\d+);(\d+)', data)
    assert raster is not None
    assert raster.groups()[:2] == ("1", "1")  # square pixels
    width, height = int(raster[3]), int(raster[4])
    pixels = np.full((height + 5, width, 3), -1, int)
    palette: dict[int, tuple[int, ...]] = {}
    x = y = color = 0
    pattern = r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)([?-~])|([?-~])|(\$)|(-)"
    for token in re.finditer(pattern, data[raster.end() :]):
        if token[1] is not None:
            color = int(token[1])
            if token[2] is not None:
                palette[color] = tuple(round(int(p) * 2.55) for p in token.group(2, 3, 4))
        elif token[8]:
            x = 0
        elif token[9]:
            x, y = 0, y + 6
        else:
            count, bits = int(token[5] or 1), ord(token[6] or token[7]) - ord("?")
            for bit in range(6):
                if bits >> bit & 1:
                    pixels[y + bit, x : x + count] = palette[color]
            x += count
    assert (pixels[:height] >= 0).all(), "a pixel was not drawn"
    assert (pixels[height:] < 0).all(), "drawn below the picture"
    return Image.fromarray(pixels[:height].astype(np.uint8))
