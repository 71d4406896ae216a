"""Glyphs: letters of six scripts in the sixteen typefaces that come with matplotlib (DejaVu and STIX).

Classes are characters: letters that Unicode composes of nothing else, in at least ``faces`` of the typefaces. What
looks alike is one class: of two characters that are drawn nearly the same in the typefaces that have both, such as the
Latin, Greek and Cyrillic A, only the first by code point stays. All are drawn at one size, so that small letters are
small, their ink in the middle. To draw them takes seconds, so they are cached (see ``lab.datamodules.cache``).

For few-shot learning the classes are split by script: Latin and Cyrillic to learn from, Greek to validate on,
Armenian, Georgian and Lao to be tested on, none of which is seen before.
"""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from lab.batch import Labelled
from lab.datamodules.cache import cached
from lab.datamodules.labelled import LabelledData
from lab.ranges import checked
from lab.registry import nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.ImageFont import FreeTypeFont

SIDE, EM = 28, 20
"""Pixels of an image's side, and of a typeface's em less its margins."""
SHARP = 80
"""Pixels of the em that is drawn and then made smaller."""
ALIKE = 0.05
"""Squared distance of two characters' images, by the sum of their squared lengths, mean over typefaces."""
UNUSABLE = ("LastResort", "cm", "STIXSiz", "STIXNonUni")
FACES = 16
SCRIPTS = ("latin", "cyrillic", "greek", "armenian", "georgian", "lao")


class Glyphs(LabelledData):
    """Images ``(1, 28, 28)`` in [0, 1] of about 770 letters, 8 to 16 of each, one a typeface.

    Args:
        faces: in how many of the 16 typefaces a character must be.
        val_scripts: scripts whose classes are for validation, where classes are split.
        test_scripts: the same for tests.

    Raises:
        ValueError: a script that there is not, or one in both.
    """

    @checked
    def __init__(
        self,
        faces: Annotated[int, Ge(2), Le(FACES)] = 8,
        val_scripts: tuple[str, ...] = ("greek",),
        test_scripts: tuple[str, ...] = ("armenian", "georgian", "lao"),
        **labelled: Any,
    ) -> None:
        super().__init__(**labelled)
        if both := set(val_scripts) & set(test_scripts):
            raise ValueError(f"{min(both)} is in val_scripts and in test_scripts")
        for script in (*val_scripts, *test_scripts):
            if script not in SCRIPTS:
                raise ValueError(f"there is no script '{script}'{nearest(script, SCRIPTS)}")
        self.faces = faces
        self.val_scripts = val_scripts
        self.test_scripts = test_scripts
        self.class_splits: dict[str, list[int]] | None = None
        """Classes to learn from, to validate and to test on, where classes are split."""

    def prepare_data(self) -> None:
        """Draw and cache them, once for all processes and runs."""
        _glyphs(self.faces)

    def load(self) -> Labelled:
        """All of them, in the order of their code points."""
        tensors = _glyphs(self.faces)
        characters, targets = torch.unique(tensors["characters"], return_inverse=True)
        self.classes = [unicodedata.name(chr(code)) for code in characters.tolist()]
        scripts = [name.split()[0].lower() for name in self.classes]
        self.class_splits = {"train": [], "val": [], "test": []}
        for number, script in enumerate(scripts):
            split = "test" if script in self.test_scripts else "val" if script in self.val_scripts else "train"
            self.class_splits[split].append(number)
        return Labelled(tensors["images"].unsqueeze(1), targets)


def _glyphs(faces: int) -> dict[str, Tensor]:
    """``images`` ``[N, 28, 28]`` uint8, and their ``characters`` ``[N]``, code points."""
    versions = "-".join(importlib.metadata.version(name) for name in ("matplotlib", "pillow"))
    return cached(f"glyphs-{faces}-{versions}", lambda: _drawn(faces))


def _drawn(faces: int) -> dict[str, Tensor]:
    from PIL import ImageFont

    files = _typefaces()
    held = [_characters(file) for file in files]
    count = Counter(code for codes in held for code in codes)
    letters = sorted(code for code, number in count.items() if number >= faces and _is_letter(chr(code)))
    images: dict[tuple[int, int], NDArray[np.uint8]] = {}
    for face, (file, codes) in enumerate(zip(files, held, strict=True)):
        font = ImageFont.truetype(str(file), SHARP)
        for code in letters:
            if code in codes and (image := _image(font, chr(code))) is not None:
                images[code, face] = image
    kept = sorted(
        (code, face) for code in _unlike(images, letters) for face in range(len(files)) if (code, face) in images
    )
    return {
        "images": torch.from_numpy(np.stack([images[key] for key in kept])),
        "characters": torch.tensor([code for code, _ in kept]),
    }


def _typefaces() -> list[Path]:
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    names = sorted(file for file in folder.glob("*.ttf") if not file.name.startswith(UNUSABLE))
    return [file for file in names if "Display" not in file.name]


def _characters(file: Path) -> set[int]:
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(str(file)).get_charmap())


def _is_letter(character: str) -> bool:
    """Whether it is a letter of a script, and no accented or otherwise composed one."""
    return (
        unicodedata.category(character) in ("Lu", "Ll", "Lo")
        and not unicodedata.decomposition(character)
        and unicodedata.name(character).split()[0].lower() in SCRIPTS
    )


def _image(font: FreeTypeFont, character: str) -> NDArray[np.uint8] | None:
    """``[28, 28]``; None where there is no ink."""
    from PIL import Image

    mask: Any = font.getmask(character, mode="L")
    ink = np.asarray(mask, dtype=np.uint8).reshape(mask.size[::-1])
    rows, columns = (np.flatnonzero(ink.max(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = min(EM / (0.9 * SHARP), (SIDE - 2) / max(ink.shape))
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    image = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    image[top : top + height, left : left + width] = small
    return image


def _unlike(images: dict[tuple[int, int], NDArray[np.uint8]], letters: list[int]) -> list[int]:
    """The letters that look like none that is kept before them."""
    pictures = torch.zeros(len(letters), FACES, SIDE * SIDE)
    there = torch.zeros(len(letters), FACES)
    places = {code: place for place, code in enumerate(letters)}
    for (code, face), image in images.items():
        pictures[places[code], face] = torch.from_numpy(image).flatten() / 255
        there[places[code], face] = 1
    distance, common = torch.zeros(len(letters), len(letters)), there @ there.T
    for face in range(FACES):
        lengths = pictures[:, face].square().sum(1)
        squared = lengths[:, None] + lengths[None] - 2 * pictures[:, face] @ pictures[:, face].T
        both = there[:, face, None] * there[None, :, face]
        distance += both * squared / (lengths[:, None] + lengths[None]).clamp(min=1e-6)
    distance = torch.where(common > 0, distance / common.clamp(min=1), 1.0)
    kept: list[int] = []
    for place in range(len(letters)):
        if bool(there[place].any()) and not bool((distance[place, kept] <= ALIKE).any()):
            kept.append(place)
    return [letters[place] for place in kept]
