"""ImageNet at 32 x 32: all 1,281,167 training images with their classes, which are the reference
too.

    python datasets/imagenet32.py --source Imagenet32_train_npz.zip --out datasets/imagenet32

The source is the published "downsampled ImageNet" (Chrabaszcz et al. 2017), npz or pickle version,
zipped or unpacked: train_data_batch_1 to train_data_batch_10. The npz version is preferred where
both are; of pickles nothing but arrays, lists and text is read (data/safe_pickle.py).

Writes DIR/train.npz: arr_0 uint8 [1281167, 32, 32, 3], arr_1 int64 [1281167] labels 0 to 999
(published: 1 to 1000). DIR/reference.npz is another name of the same file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from tqdm import tqdm

from guided_diffusion_ip.data import preprocessing
from guided_diffusion_ip.data.npz_io import NpzReader, NpzWriter, merge_npz, read_arrays
from guided_diffusion_ip.preparation.publishers import Archive, PublishedSet
from guided_diffusion_ip.preparation.safe_pickle import load_batch
from guided_diffusion_ip.preparation.writers import TRAIN, is_finished, scratch, write_reference
from guided_diffusion_ip.settings.config import command

SET = PublishedSet(
    "downsampled ImageNet 32x32 (train)",
    "https://image-net.org/download-images.php",
    (
        "Imagenet32_train_npz",
        "Imagenet32_train_npz.zip",
        "Imagenet32_train",
        "Imagenet32_train.zip",
    ),
    1_281_167,
)
BATCHES = tuple(f"train_data_batch_{k}" for k in range(1, 11))
RECORD = "imagenet32 32x32x3"
PIXELS = 3 * 32 * 32
CLASSES = 1000
_CHUNK = 4096  # images turned from planes to pixels at a time


def read_batch(file: IO[bytes], name: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 3072] (plane after plane) and labels int64 [n], from 0, of one batch; 400
    MB.

    Raises:
        ValueError: damaged, or not such a batch.
    """
    if name.endswith(".npz"):
        batch = read_arrays(file, ("data", "labels"), where)
    else:
        batch = load_batch(file, where)
    data, labels = batch.get("data"), np.asarray(batch.get("labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (PIXELS,):
        raise ValueError(f"{where} holds no 'data' of uint8 [n, {PIXELS}]")
    if not len(data):
        raise ValueError(f"{where} holds no images: download it again")
    if (
        labels.shape != data.shape[:1]
        or labels.dtype.kind not in "iu"
        or not (1 <= labels.min() and labels.max() <= CLASSES)
    ):
        raise ValueError(
            f"{where} holds no 'labels' from 1 to {CLASSES}, one for each of its {len(data)} images"
        )
    return data, labels.astype(np.int64) - 1


def _pixels(planes: np.ndarray) -> Iterator[np.ndarray]:
    """uint8 [n, 3072], plane after plane -> chunks uint8 [., 32, 32, 3]."""
    for start in range(0, len(planes), _CHUNK):
        yield planes[start : start + _CHUNK].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def make_training_set(out: str, source: str, allow_partial: bool) -> int:
    """Write OUT/train.npz; returns how many images it has."""
    path = SET.find(source)
    with Archive(path, {*BATCHES, *(f"{name}.npz" for name in BATCHES)}) as archive:
        ending = ".npz" if any(name.endswith(".npz") for name in archive.names) else ""
        chosen = [f"{name}{ending}" for name in BATCHES if f"{name}{ending}" in archive.names]
        if not chosen:
            raise ValueError(SET.advice(f"{path} holds no {BATCHES[0]} or {BATCHES[0]}.npz"))
        if len(chosen) < len(BATCHES) and not allow_partial:
            raise ValueError(
                f"{path} holds {len(chosen)} of {len(BATCHES)} batches: download the rest "
                "(--allow_partial takes what is there)"
            )
        train, n = os.path.join(out, TRAIN), 0
        with scratch(train) as place:
            pieces = [os.path.join(place, f"{k}.npz") for k in range(len(chosen))]
            for name, piece in zip(tqdm(chosen, "batches", disable=None), pieces):
                with archive.open(name) as file:
                    planes, labels = read_batch(file, name, f"{archive.path}: {name}")
                with NpzWriter(piece) as npz:
                    npz.write("arr_0", (len(planes), 32, 32, 3), np.uint8, _pixels(planes))
                    npz.write("arr_1", labels.shape, labels.dtype, [labels])
                n += len(planes)
            SET.check(n, allow_partial)
            print("joining the batches", flush=True)
            record = {preprocessing.KEY: preprocessing.as_array(RECORD)}
            merge_npz(os.path.join(place, TRAIN), pieces, n, record)
            os.replace(os.path.join(place, TRAIN), train)
    return n


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; what is finished is left as it is."""
    args = SET.parser(__doc__).parse_args(argv)
    train = os.path.join(args.out, TRAIN)
    if os.path.exists(train):
        with NpzReader(train) as reader:
            n = SET.check(reader.shape("arr_0")[0], args.allow_partial)
        is_finished(train, n, RECORD)  # an error if it is another set
    else:
        n = make_training_set(args.out, args.source, args.allow_partial)
    print(f"{train}: {n:,} images, {CLASSES} classes")
    print(write_reference(args.out, n, RECORD))


if __name__ == "__main__":
    command(main)
