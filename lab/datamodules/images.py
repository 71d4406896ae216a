"""Anyone's images: a folder of files for every class.

photos/cat/1.jpg            photos/train/cat/1.jpg
photos/cat/2.jpg            photos/val/cat/2.jpg          (or valid, validation)
photos/dog/1.png            photos/test/dog/1.png
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from lab.batch import Labelled
from lab.datamodules.decoding import DecodedData, Encoded, formats
from lab.datamodules.labelled import Splits
from lab.datamodules.own import indices
from lab.ranges import ExistingFolder, checked
from lab.registry import nearest

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""The folders of data that come split."""


class Images(DecodedData):
    """A folder with a folder of images for every class, or with ``train``, ``val`` and ``test`` that have those.

    Splits that have no folder are cut from the training images. Classes are in the order of their sorted names; a
    class's folder may have folders in it. Names that start with a dot are left alone, and so are files that are no
    images. Images without a folder for their class have no label.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: it isn't there.
        ValueError: it holds no images, those of one class only, an empty class, a class that training doesn't have, or
            an image that cannot be read; the message names it.
    """

    kept: ClassVar[dict[str, Any]] = {**DecodedData.kept, "classes": list[str]}

    @checked
    def __init__(self, path: ExistingFolder, **decoded: Any) -> None:
        super().__init__(**decoded)
        self.path = path

    def load(self) -> Splits:
        """The images in the order of their paths, split by split."""
        folders = self._splits()
        found = {split: _classes(folder) for split, folder in folders.items()}
        files = [(split, name, file) for split, part in found.items() for name in sorted(part) for file in part[name]]
        if not files:
            raise ValueError(f"{self.path} holds no images ({', '.join(sorted(_suffixes())[:8])}, …)")
        if not self.given:
            self._learnable(found)
        if self.given or any(name for _, name, _ in files):
            self.classes = self.once("classes", lambda: sorted(name for name in found["train"] if name))
        images = self.decode(_Files(self.path, [file for _, _, file in files]))
        parts: dict[str, Labelled] = {}
        for split in ("train", "val", "test"):
            places = [place for place, file in enumerate(files) if file[0] == split]
            names_of = [files[place][1] or None for place in places]
            targets = indices(names_of, self.classes or [], str(folders.get(split, self.path)))
            begin = places[0] if places else 0
            parts[split] = Labelled(images[begin : begin + len(places)], targets)
        return Splits(parts["train"], *(parts[split] if split in folders else None for split in ("val", "test")))

    def _splits(self) -> dict[str, Path]:
        """The folder of each split, ``train`` first; the folder itself where it isn't split."""
        inside = _folders(self.path)
        named: dict[str, Path] = {}
        for name in sorted(inside, key=list(SPLITS).index) if inside and set(inside) <= set(SPLITS) else []:
            if SPLITS[name] in named:
                raise ValueError(
                    f"{self.path} has both {named[SPLITS[name]].name}/ and {name}/: one of them is too many"
                )
            named[SPLITS[name]] = inside[name]
        if "train" in inside and not named and any(_folders(inside["train"])):
            others = sorted(set(inside) - set(SPLITS))
            raise ValueError(
                f"{self.path} has train/ and beside it {', '.join(others)}/{nearest(others[0], SPLITS)}: "
                "data that come split have folders for splits only"
            )
        return named or {"train": self.path}

    def _learnable(self, found: dict[str, dict[str, list[Path]]]) -> None:
        """Refuse what no classifier can be trained on; what has no class at all may be learnt from without labels."""
        train = {name: files for name, files in found.get("train", {}).items() if name}
        empty = [f"{split}/{name}" if len(found) > 1 else name for split, part in found.items() for name in part
                 if not part[name]]  # fmt: skip
        if empty:
            raise ValueError(f"{self.path}: no images in the class folder{'s' * (len(empty) > 1)} {', '.join(empty)}")
        if len(train) == 1:
            raise ValueError(
                f"{self.path} has images of one class only, '{next(iter(train))}': two at least are needed"
            )
        if not train and (len(found) > 1 or "train" not in found):
            raise ValueError(f"{self.path} has no folder train/ with a folder for every class")


class _Files(Encoded):
    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.folder = folder
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, position: int) -> str:
        return str(self.files[position])

    def content(self, position: int) -> Path:
        return self.files[position]

    def length(self, position: int) -> int:
        return self.files[position].stat().st_size

    def key(self, position: int) -> str:
        return self.files[position].relative_to(self.folder).as_posix()


def _classes(folder: Path) -> dict[str, list[Path]]:
    """The images of each class, sorted; those that lie in the folder itself under an empty name."""
    found = {name: sorted(_images(inside)) for name, inside in _folders(folder).items()}
    loose = sorted(entry for entry in folder.iterdir() if _is_image(entry.name) and entry.is_file())
    if loose and found:
        raise ValueError(
            f"{loose[0]} lies beside the class folders {', '.join(sorted(found)[:3])}: of which class is it?"
        )
    return {"": loose} if loose else found


def _images(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if _is_image(name))


def _folders(folder: Path) -> dict[str, Path]:
    return {entry.name: entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _suffixes()  # noqa: PTH122  # fast


@functools.cache
def _suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats())
