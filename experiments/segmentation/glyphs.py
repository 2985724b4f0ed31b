"""Draws the glyphs that scenes are composed of, and keeps them as arrays in an .npz file.

The font is Noto Color Emoji, under the SIL Open Font License 1.1; on Debian it is the package
fonts-noto-color-emoji. Where the file of arrays is, no font is needed.
"""

import argparse
import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.cli import UserError, reading, run
from utils.files import write_file

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
BITMAP_SIZE = 109  # the one size of the font's bitmaps, which are 136 pixels wide and 128 high
IMAGE_SIZE = 136

# What the networks tell apart: label 1 is the first. Label 0 is all else.
CLASSES = {
    "face": "😀😃😄😁😆😅😂🙂🙃😉😊😍😘😋😜😐😶😏🙄😬😴😷😎😕🙁😮😲😳😨😢😭😖😤😡",
    "animal": "🐵🐶🐺🐱🦁🐯🐴🦄🐮🐷🐗🐭🐹🐰🐻🐼🐨🐸🦊🐔🦝🐲",
    "fruit": "🍇🍈🍉🍊🍋🍌🍍🍎🍏🍐🍑🍒🍓🥝🍅🥥🥑🍆🥔🥕🌽🥒🥦",
    "vehicle": "🚗🚕🚙🚌🚎🚓🚑🚒🚐🚚🚛🚜🚂🚆🚋🚲🛵🏍🚀✈🚁⛵🚤",
    "plant": "💐🌸🏵🌹🥀🌺🌻🌼🌷🍀🌱🌲🌳🌴🌵🌾🌿☘🍁🍂🍃",
    "building": "🏠🏡🏢🏣🏤🏥🏦🏨🏩🏪🏫🏬🏭🏯🏰🗼🗽⛪🕌🛕🕍",
    "clothing": "👓🕶👔👕👖🧣🧤🧥🧦👗👘👙👚👛👜👝🎒👞👟👠👡👢👑👒🎩🎓🧢",
    "hand": "👋🤚🖐✋🖖👌✌🤞🤟🤘🤙👈👉👆👇☝👍👎✊👊👏👐",
    "heart": "❤💛💚💙💜🖤💔💕💖💗💘💝💞🧡💟💓",
    "clock": "🕐🕑🕒🕓🕔🕕🕖🕗🕘🕙🕚🕛🕜🕝🕞🕟",
}
CLUTTER = (
    "🍞🥐🥖🥨🥞🧀🍖🍗🥩🥓🍔🍟🍕🌭🥪🌮🌯🍳🥘🍲🍜🍝🍣🍤🍦🍧🍩🍪🎂🍰🧁🥧🍫🍬🍭"
    "⚽⚾🏀🏐🏈🏉🎾🎳🥎🎱🏓🎷🎸🎹🎺🎻🥁🎤🎧📯🔔🔨⛏⚒🗡🔫🏹🛡🔧🔩⚙🗜⚖🔑🗝✂🖊🖌📏📐📎📌"
    "♈♉♊♋♌♍♎♏♐♑♒♓⬆↗➡↘⬇↙⬅↖↕↔↩↪"
)
NAMES = ("background", *CLASSES)


class Glyphs(NamedTuple):
    """Pictures of glyphs: images `[G, S, S, 4]`, RGBA in uint8 and not premultiplied; labels `[G]`,
    uint8, where 0 is clutter."""

    images: np.ndarray
    labels: np.ndarray

    def unseen(self) -> np.ndarray:
        """`[G]`: whether a glyph is kept from training, as every fourth of its label is."""
        rank = [np.count_nonzero(self.labels[:i] == label) for i, label in enumerate(self.labels)]
        return np.array(rank) % 4 == 3

    def digest(self) -> str:
        """A short name for these glyphs and no others."""
        told = hashlib.sha256(repr(self.images.shape).encode())
        told.update(self.images.tobytes() + self.labels.tobytes())
        return told.hexdigest()[:12]

    def encoded(self) -> bytes:
        """The content of the file that `load` reads."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=self.images, labels=self.labels)
        return buffer.getvalue()


def render(font: Path = FONT) -> Glyphs:
    """Draws the glyphs of all classes, and of clutter, with a font of colour bitmaps.

    Raises:
      UserError: the font is missing, is no such font, or lacks a glyph.
    """
    if not Path(font).is_file():
        raise UserError(
            f"font {font} not found: install Debian's fonts-noto-color-emoji, name the file with "
            "--font, or name arrays that were drawn elsewhere with --glyphs"
        )
    from PIL import ImageFont

    with reading(f"{font} is no font with colour bitmaps of size {BITMAP_SIZE}"):
        opened = ImageFont.truetype(str(font), BITMAP_SIZE)
    characters = [CLUTTER, *CLASSES.values()]
    images = [_draw(character, opened) for group in characters for character in group]
    labels = np.repeat(np.arange(len(characters), dtype=np.uint8), [len(g) for g in characters])
    return Glyphs(np.stack(images), labels)


def _draw(character: str, font) -> np.ndarray:
    from PIL import Image, ImageDraw

    image = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE))
    ImageDraw.Draw(image).text((0, 0), character, font=font, embedded_color=True)
    array = np.array(image)
    if not array[..., 3].any():
        raise UserError(f"the font has no glyph for {character} (U+{ord(character):X})")
    return array


def load(path: Path) -> Glyphs:
    """Reads what `Glyphs.encoded` wrote.

    Raises:
      UserError: it holds something else.
    """
    with reading(f"{path} holds no glyphs"), np.load(path) as file:
        glyphs = Glyphs(file["images"], file["labels"])
        count, side = glyphs.images.shape[:2]
        if glyphs.images.shape != (count, side, side, 4) or glyphs.labels.shape != (count,):
            raise ValueError(f"images are {glyphs.images.shape}, labels {glyphs.labels.shape}")
        if {*np.unique(glyphs.labels)} != {*range(len(NAMES))}:
            raise ValueError(f"labels are not all of 0 to {len(NAMES) - 1}")
    return glyphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, default=FONT, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="the .npz file to write")
    arguments = parser.parse_args()
    data = render(arguments.font).encoded()
    write_file(arguments.output, data)
    print(f"wrote {arguments.output}, {len(data) / 2**20:.1f} MiB")


if __name__ == "__main__":
    run(main)
