"""Image files as tensors: decoded by pillow, once into memory where they fit, else whenever they are served.

``channels`` and ``size`` make images of all kinds alike. An image is turned as its EXIF orientation says; what is
transparent becomes white; 16 bits become 8. ``size`` resizes, antialiased, until the image covers it, and cuts out the
centre: ``size: 224`` is the usual resize of the shorter side and centre crop.
"""

from __future__ import annotations

import functools
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lab.datamodules.lazy import Lazy, Source, fits
from lab.datamodules.own import OwnData, streamed
from lab.ranges import Count, Whole, checked

FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX"),
    *("QOI", "SGI", "DDS", "ICNS"),
)
"""What is decoded: formats of pixels, none that runs a program (as PostScript does)."""
READ_FOR_FINGERPRINT = 10**9
"""How many bytes a fingerprint reads at most."""
_GREY = ("1", "L", "LA", "La", "I", "F")
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_EXIF = {"exif", "Raw profile type exif"}


class Encoded(ABC):
    """Image files, wherever they lie; sent to other processes with pickle."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def name(self, position: int) -> str:
        """What an error calls one."""

    @abstractmethod
    def content(self, position: int) -> Any:
        """One's bytes, or its path."""

    @abstractmethod
    def length(self, position: int) -> int:
        """How many they are."""

    def key(self, position: int) -> str:
        """Its name wherever the data lie."""
        return self.name(position)


class Decoded(Source):
    """Image files as uint8 tensors ``[C, H, W]``.

    Args:
        channels: 1 or 3.
        size: ``(H, W)`` to resize to; None: they have the size ``shape``.
        shape: ``(C, H, W)``.
    """

    def __init__(self, files: Encoded, channels: int, size: tuple[int, int] | None, shape: tuple[int, ...]) -> None:
        self.files = files
        self.channels = channels
        self.size = size
        self.shape = shape

    def __len__(self) -> int:
        return len(self.files)

    def read(self, position: int) -> Tensor:
        """One image, ``[C, H, W]``."""
        try:
            with _opened(self.files.content(position)) as image:
                pixels = decoded(image, self.channels, self.size)
            if pixels.shape != self.shape:
                raise ValueError(f"has another shape, {pixels.shape}, than the others, {self.shape}: say `size:`")
            return torch.from_numpy(pixels)
        except Exception as cause:  # pillow raises whatever a damaged file leads it to
            raise ValueError(f"{self.files.name(position)} {_unreadable(cause)}") from cause

    def fingerprint(self) -> str:
        """SHA-256 of names and sizes, and of the bytes where they are less than a gigabyte together."""
        total = hashlib.sha256()
        sizes = [self.files.length(position) for position in range(len(self.files))]
        whole = sum(sizes) < READ_FOR_FINGERPRINT
        for position, size in enumerate(sizes):
            total.update(f"{self.files.key(position)} {size}\n".encode())
            if whole:
                content = self.files.content(position)
                total.update(content.read_bytes() if isinstance(content, Path) else content)
        return total.hexdigest()


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this pillow can read."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def decoded(image: Image.Image, channels: int, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """One image's pixels, ``[C, H, W]``."""
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if size is not None and (image.height, image.width) != size:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _eight_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grey image with 8 bits."""
    if image.mode == "F":
        raise ValueError("has floating-point pixels: use `name: arrays`")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"has pixels from {values.min()} to {values.max()}, more than 16 bits: use `name: arrays`")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


class DecodedData(OwnData):
    """Data whose inputs are image files; a subclass finds them.

    Args:
        channels: 1: grey; 3: RGB; None: as most of them need: 1 where all are grey, else 3.
        size: ``(height, width)``, or of a square, to resize and crop to; None: they all have one size.
        in_memory: whether they are decoded once, at the start, instead of whenever they are served; None: where they
            take a quarter of the machine's memory at most.
        num_workers: processes that decode what is not in memory; 0: the training process itself.
    """

    kept: ClassVar[dict[str, Any]] = {"channels": Literal[1, 3]}

    @checked
    def __init__(
        self,
        *,
        channels: Literal[1, 3] | None = None,
        size: Count | tuple[Count, Count] | None = None,
        in_memory: bool | None = None,
        num_workers: Whole = 2,
        **labelled: Any,
    ) -> None:
        super().__init__(**labelled)
        self.channels = channels
        self.size = (size, size) if isinstance(size, int) else size
        self.in_memory = in_memory
        self.num_workers = num_workers

    def decode(self, files: Encoded) -> Tensor:
        """All images, ``[N, C, H, W]``: a tensor, or a :class:`~lab.datamodules.lazy.Lazy`.

        Raises:
            ValueError: one cannot be read, or they differ in size and ``size`` doesn't say which to give them.
        """
        channels: int | None = self.channels or self.learnt.get("channels")
        size = self.size
        if channels is None or size is None:
            heads = _heads(files)
            grey = all(grey for grey, _ in heads)
            channels = channels or self.once("channels", lambda: 1 if grey else 3)
            size = size or _one_size(files, [size for _, size in heads])
        source = Decoded(files, channels, self.size, (channels, *size))
        images = Lazy(source)
        return images.read() if self.in_memory or (self.in_memory is None and fits(images)) else streamed(images)


def _heads(files: Encoded) -> list[tuple[bool, tuple[int, int]]]:
    """Whether each image is grey, and its ``(H, W)``; only their first bytes are looked at."""

    def head(position: int) -> tuple[bool, tuple[int, int]]:
        try:
            with _opened(files.content(position)) as image:
                width, height = image.size
                if _tells(image) and image.getexif().get(_ORIENTATION) in _TURNED:
                    width, height = height, width
                return image.mode.split(";")[0] in _GREY, (height, width)
        except Exception as cause:
            raise ValueError(f"{files.name(position)} {_unreadable(cause)}") from cause

    return [head(position) for position in range(len(files))]  # threads would wait for each other: it is all Python


def _tells(image: Image.Image) -> bool:
    """Whether the head of a file says how it is turned: pillow has turned a TIFF, and would decode all of a PNG."""
    return image.format != "TIFF" and (image.format != "PNG" or bool(image.info.keys() & _EXIF))


def _one_size(files: Encoded, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    first = sizes[0]
    for position, size in enumerate(sizes):
        if size != first:
            raise ValueError(
                f"images of several sizes: {files.name(0)} has {first[0]} × {first[1]} pixels (height × width), "
                f"{files.name(position)} {size[0]} × {size[1]}; say which to give them, such as `size: {min(first)}`"
            )
    return first


def _opened(content: Any) -> Image.Image:
    return Image.open(content if isinstance(content, Path) else io.BytesIO(content), formats=formats())


def _unreadable(cause: Exception) -> str:
    said = str(cause)
    if isinstance(cause, UnidentifiedImageError):
        said = f"it is empty or none of {', '.join(FORMATS[:6])}, …"
    return said if said.startswith("has ") else f"cannot be read as an image: {said}"
