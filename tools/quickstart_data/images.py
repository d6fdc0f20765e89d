"""Draw glyphs with Pillow and store them as 64x64 RGB WebP on white."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from sailplan.data.writer import BuildError

SIDE = 64  # pixels
NOTO_SIZE = 109  # the one size of Noto Color Emoji's bitmaps (136 x 128 pixels)
EIGHT_GREYS = [round(value / 255 * 7) * 255 // 7 for value in range(256)]


def check_pillow() -> None:
    for feature, why in (
        ("raqm", "emoji sequences cannot be shaped"),
        ("webp", "images cannot be stored"),
    ):
        if not features.check(feature):
            raise BuildError(
                f"this Pillow has no {feature.upper()} support: {why}; install Pillow's own wheel"
            )


def webp(image: Image.Image, *, lossless: bool, quality: int = 80) -> bytes:
    out = io.BytesIO()
    # method 6 at quality 100 makes lossless pictures 12 % smaller and takes tens of times as long
    image.save(
        out,
        "WEBP",
        lossless=lossless,
        quality=90 if lossless else quality,
        method=4 if lossless else 6,
    )
    return out.getvalue()


def on_white(image: Image.Image) -> Image.Image:
    """Fit an RGBA picture into a white square, keeping its proportions."""
    sheet = Image.new("RGBA", image.size, "white")
    sheet.alpha_composite(image)
    small = sheet.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return square


class EmojiPainter:
    """Draws an emoji sequence, or returns None where the font has no single glyph for it."""

    def __init__(self, font: Path) -> None:
        self.font = ImageFont.truetype(str(font), NOTO_SIZE, layout_engine=ImageFont.Layout.RAQM)

    def draw(self, text: str) -> Image.Image | None:
        if not 100 <= self.font.getlength(text) <= 140:  # several glyphs, or an empty one
            return None
        image = Image.new("RGBA", (136, 128), (255, 255, 255, 0))
        ImageDraw.Draw(image).text((0, 0), text, font=self.font, embedded_color=True)
        box = image.getchannel("A").getbbox()
        return on_white(image.crop(box)) if box else None


class IconPainter:
    """Draws one glyph of an icon font, black on white, edges in eight greys (a third smaller
    than 256 when lossless).
    """

    def __init__(self, font: Path) -> None:
        self.font = ImageFont.truetype(str(font), 60, layout_engine=ImageFont.Layout.BASIC)

    def draw(self, codepoint: int) -> Image.Image:
        image = Image.new("L", (SIDE, SIDE), 255)
        ImageDraw.Draw(image).text(
            (SIDE // 2, SIDE // 2), chr(codepoint), font=self.font, fill=0, anchor="mm"
        )
        return image.point(EIGHT_GREYS).convert("RGB")
