"""What the previews of all families are drawn with: the bar with the facts, hatched margins."""

from __future__ import annotations

from bisect import bisect_right

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

SMOOTH = 2  # everything is drawn this much larger and then reduced
MARGIN = 28
TITLE_HEIGHT = 104
MIN_WIDTH = 760

PAPER = (247, 248, 250)
BAR = (23, 32, 46)
_BAR_TEXT = (255, 255, 255)
_BAR_FAINT = (166, 180, 200)
HATCH_GROUND = (226, 230, 236)
HATCH_LINE = (180, 188, 200)
ACCENT = (234, 88, 12)
WHITE = (255, 255, 255)
SQUARE = 672 * SMOOTH  # side of a drawn square, pixels; its sheet has 760 x 832


def on_sheet(source: str, lines: tuple[str, str], drawing: PILImage.Image) -> PILImage.Image:
    """A framed drawing under a title with the facts, as an RGB picture of the size of people."""
    margin, title = SMOOTH * MARGIN, SMOOTH * TITLE_HEIGHT
    width = max(drawing.width + 2 * margin, SMOOTH * MIN_WIDTH)
    height = title + drawing.height + 2 * margin
    # An odd size would lose its last pixel when the sheet is reduced.
    sheet = PILImage.new("RGB", (width + width % SMOOTH, height + height % SMOOTH), PAPER)
    left, top = (width - drawing.width) // 2, title + margin
    sheet.paste(drawing, (left, top))
    draw = ImageDraw.Draw(sheet)
    draw_title(draw, source, lines, width)
    box = (left, top, left + drawing.width - 1, top + drawing.height - 1)
    draw.rectangle(box, outline=ACCENT, width=2 * SMOOTH)
    return sheet.reduce(SMOOTH)


def hatched(height: int, width: int) -> PILImage.Image:
    """Where no picture is."""
    ground = PILImage.new("RGB", (width, height), HATCH_GROUND)
    draw = ImageDraw.Draw(ground)
    for start in range(-height, width, 14 * SMOOTH):
        draw.line((start, height, start + height, 0), fill=HATCH_LINE, width=2 * SMOOTH)
    return ground


def draw_title(draw: ImageDraw.ImageDraw, name: str, lines: tuple[str, str], width: int) -> None:
    """The dark bar with the name of the picture and its facts."""
    margin = SMOOTH * MARGIN
    draw.rectangle((0, 0, width + 1, SMOOTH * TITLE_HEIGHT), fill=BAR)
    rows = (
        (name, 22, 26, _BAR_TEXT),
        (lines[0], 16, 56, _BAR_FAINT),
        (lines[1], 16, 80, _BAR_FAINT),
    )
    for text, size, y, colour in rows:
        chosen = font(size)
        text = shortened(draw, one_line(text), chosen, width - 2 * margin)
        draw.text((margin, SMOOTH * y), text, fill=colour, font=chosen, anchor="lm")


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SMOOTH)


def one_line(text: str) -> str:
    """Control characters would break the line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def shortened(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: float,
) -> str:
    """`text`, its middle replaced by dots if it is wider than `width` pixels."""
    text = text if len(text) <= 400 else f"{text[:200]}…{text[-200:]}"
    if len(text) <= 2 or draw.textlength(text, font=font) <= width:
        return text

    def cut(half: int) -> str:
        return f"{text[:half]}…{text[-half:]}"

    halves = range(1, (len(text) + 1) // 2)
    fitting = bisect_right(halves, width, key=lambda half: draw.textlength(cut(half), font=font))
    return cut(max(1, fitting))
