"""Pixels: uint8 <-> [-1, 1], NHWC <-> NCHW, decoding, crops, PNG files.

The only place that knows 127.5. In memory an image batch is float32 [N, C, H, W] in [-1, 1]; on
disk uint8 [N, H, W, C].
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files import atomic_file
from ..sizes import parse_size

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_PADDING = 2
_PADDING_GREY = 128  # neither the black of MNIST-like images nor the white of drawings
_CAPTION_HEIGHT = 12


def to_model_range(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] = x / 127.5 - 1, in [-1, 1].

    Raises:
        ValueError: another number type, or not four dimensions.
    """
    if isinstance(images, np.ndarray) and not images.flags.writeable:
        images = images.copy()  # torch has no read-only tensors and would warn
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}"
        )
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(127.5).sub_(1.0)


def to_uint8(x: Tensor, rounded: bool = False) -> Tensor:
    """float [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C] = clamp((x + 1) 127.5, 0, 255),
    truncated.

    Truncation is ADM's way, and makes images half a level darker on average; FIDs see it. In
    float32 at least.

    Args:
        rounded: clamp(127.5 x + 128, 0, 255), truncated, which is the nearest level: EDM's way.

    Raises:
        ValueError: not four dimensions, or a NaN, which no pixel can show.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"images must be float [N, C, H, W], got {x.dtype} {list(x.shape)}")
    if torch.isnan(x).any():
        bad = int(torch.isnan(x).flatten(1).any(1).sum())
        raise ValueError(
            f"{bad} of {len(x)} images contain NaN: the model has diverged or "
            "overflows in half precision (try --use_fp16 False, or an older one)"
        )
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    levels = x * 127.5 + 128 if rounded else (x + 1) * 127.5
    pixels = levels.clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


# What is decoded: the formats of image_source.EXTENSIONS. Pillow knows many more, and hands
# PostScript to another program, which runs it.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")


def pil_mode(channels: int) -> str:
    """Pillow's name for images of 1, 3 or 4 channels.

    Raises:
        ValueError: any other number of channels.
    """
    if channels not in _MODES:
        raise ValueError(f"channels={channels} is not supported: 1 (grey), 3 (RGB) or 4 (RGBA)")
    return _MODES[channels]


def _cover(image: Image.Image, height: float, width: float) -> Image.Image:
    """Scale so that the image just covers height x width.

    Halving with a box filter while the image is at least twice as large averages all pixels, which
    one bicubic step over a large factor would not; bicubic then does the rest (also upwards).
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = (
        max(round(image.width * scale), math.ceil(width)),
        max(round(image.height * scale), math.ceil(height)),
    )
    return image.resize(size, Image.Resampling.BICUBIC)


def center_crop_arr(pil_image: Image.Image, image_size: int | Sequence[int]) -> np.ndarray:
    """Scale the shorter side to the target and cut out the middle: uint8 [H, W] or [H, W, C].

    `image_size` is one number or (H, W); smaller images are enlarged. Images that already have the
    size come back unchanged.
    """
    height, width = parse_size(image_size)
    image = _cover(pil_image, height, width)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return np.array(image)[top : top + height, left : left + width]


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int | Sequence[int],
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    uniforms: Sequence[float] | None = None,
) -> np.ndarray:
    """Cut a target-sized piece that is min_crop_frac .. max_crop_frac of the shorter side.

    Args:
        image_size: one number or (H, W).
        uniforms: three numbers in [0, 1) that decide scale, row and column; drawn if not given.

    Returns: uint8 [H, W] or [H, W, C].

    Raises:
        ValueError: unless 0 < min_crop_frac <= max_crop_frac <= 1.
    """
    if not 0 < min_crop_frac <= max_crop_frac <= 1:
        raise ValueError(
            f"crop fractions {min_crop_frac} .. {max_crop_frac} must be in (0, 1] and in order"
        )
    height, width = parse_size(image_size)
    if uniforms is None:
        uniforms = [random.random() for _ in range(3)]
    scale, row, column = (float(u) for u in uniforms)
    side = min(height, width)
    low, high = math.ceil(side / max_crop_frac), math.ceil(side / min_crop_frac)
    shorter = low + int(scale * (high - low + 1))
    image = _cover(pil_image, height * shorter / side, width * shorter / side)
    top = int(row * (image.height - height + 1))
    left = int(column * (image.width - width + 1))
    return np.array(image)[top : top + height, left : left + width]


def render(
    image: Image.Image, size: tuple[int, int], crop: Sequence[float] | None = None
) -> np.ndarray:
    """uint8 [H, W, C] of the wanted size, from the middle or where three uniforms `crop` say."""
    if crop is None:
        pixels = center_crop_arr(image, size)
    else:
        pixels = random_crop_arr(image, size, uniforms=crop)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def decode_image(
    file: bytes | IO[bytes] | str | os.PathLike, channels: int, name: str
) -> Image.Image:
    """Decode one image to 1 (grey), 3 (RGB) or 4 (RGBA) channels of 8 bits.

    Grey, 1-bit, palette, CMYK and 16-bit grey images are converted, 16 bits by 1/257 so that white
    stays white. Transparency is dropped unless channels is 4: the colours stored below it show, as
    in ADM's loader. Of an animation the first frame is taken. An EXIF orientation is *not* applied
    (ADM does not either): turn such photographs beforehand. Pillow's limit against decompression
    bombs stays on.

    Args:
        file: the bytes, an open file, or a path. name: what to call it in an error. Whatever the
            name ends in, only FORMATS are decoded.

    Raises:
        ValueError: not an image, damaged, cut short, too large, or of a kind not listed; names it.
    """
    mode = pil_mode(channels)
    try:
        source = io.BytesIO(file) if isinstance(file, bytes) else file
        with Image.open(source, formats=FORMATS) as image:
            image.load()
            return _to_mode(image, mode)
    except MemoryError:
        raise
    # Damaged files make Pillow's decoders raise anything from OSError to struct.error.
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read as an image: {error} (repair or remove this file)"
        ) from error


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()} exceed 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range: save it with 8 or 16 bits")
    elif image.mode == "PA" or image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # applies the palette and its transparency together
    return image.copy() if image.mode == mode else image.convert(mode)


def save_png(image: np.ndarray | Tensor, path: str | os.PathLike) -> None:
    """Write one image, uint8 [H, W, C] with 1, 3 or 4 channels, as PNG, atomically.

    Raises:
        ValueError: another type or shape.
    """
    _save_pil(_to_pil(np.asarray(image)), path)


# torchvision.utils.make_grid is deliberately not used: torchvision's compiled part does not load
# beside a CPU build of torch from another package index, and this is all that it would do for us.
def save_grid(
    images: np.ndarray | Tensor,
    path: str | os.PathLike,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Write images as one PNG, row by row, 2 grey pixels between them.

    Images of up to 32 pixels are enlarged by a whole factor (nearest pixel) to be visible.

    Args:
        images: uint8 [N, H, W, C], 1, 3 or 4 channels. columns: about sqrt(N) if not given.
        captions: one text per image, printed below it.

    Raises:
        ValueError: no images, another type or shape, or not one caption per image.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"a grid needs uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}"
        )
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images: one each is needed")
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} must be 1 or more")
    mode = pil_mode(images.shape[-1])
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    factor = max(1, 64 // max(images.shape[1:3]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    high = images.shape[1] + _PADDING + (_CAPTION_HEIGHT if captions is not None else 0)
    wide = images.shape[2] + _PADDING
    grey: dict[str, float | tuple[float, ...]] = {
        "L": _PADDING_GREY,
        "RGB": (_PADDING_GREY,) * 3,
        "RGBA": (_PADDING_GREY,) * 3 + (255,),
    }
    lines = -(-len(images) // columns)
    sheet = Image.new(mode, (columns * wide + _PADDING, lines * high + _PADDING), grey[mode])
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, image in enumerate(images):
        left, top = _PADDING + number % columns * wide, _PADDING + number // columns * high
        if captions is not None:  # before its image: a text too long is cut by the next image
            draw.text(
                (left, top + images.shape[1]),
                captions[number],
                font=font,
                fill=255 if mode == "L" else "white",
            )
        sheet.paste(_to_pil(image), (left, top))
    _save_pil(sheet, path)


def _to_pil(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] -> Pillow image."""
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"an image must be uint8 [H, W, C], got {image.dtype} {list(image.shape)}")
    pil_mode(image.shape[-1])
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def _save_pil(image: Image.Image, path: str | os.PathLike) -> None:
    with atomic_file(path, flush=False) as file:  # a PNG can be made again: not worth a disk flush
        image.save(file, format="PNG")
