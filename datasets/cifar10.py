"""CIFAR-10: 50,000 training images as PNGs in ten class folders, and all of them as reference.

    python datasets/cifar10.py --source cifar-10-binary.tar.gz --out datasets/cifar10

The source is the binary or the Python version, as tar.gz or unpacked; the binary one is preferred
where both are. The Python version consists of pickles, of which nothing but arrays, lists and text
is read (data/safe_pickle.py).

Writes DIR/train/airplane/00000.png ...; DIR/train.npz, the same images decoded, in the folder's
order and with its classes, which --data_dir takes too and reads faster; and DIR/reference.npz
(arr_0 uint8 [50000, 32, 32, 3], in the order of the batches). With --split test DIR/test/... from
the 10,000 test images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from guided_diffusion_ip.data.image_set import ImageSet
from guided_diffusion_ip.preparation.publishers import Archive, PublishedSet
from guided_diffusion_ip.preparation.safe_pickle import load_batch
from guided_diffusion_ip.preparation.writers import (
    REFERENCE,
    TRAIN,
    is_finished,
    open_with_classes,
    pack_images,
    write_image_folder,
    write_image_npz,
)
from guided_diffusion_ip.settings.config import command

SET = PublishedSet(
    "CIFAR-10",
    "https://www.cs.toronto.edu/~kriz/cifar.html",
    (
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
    ),
    50_000,
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
COUNTS = {"train": SET.count, "test": 10_000}
PIXELS = 3 * 32 * 32


def read_split(path: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels uint8 [N] of "train" or "test", batch after batch; 150
    MB.

    Raises:
        ValueError: no batches there, or damaged ones.
    """
    both = [*(f"{name}.bin" for name in BATCHES[split]), *BATCHES[split]]
    with Archive(path, both) as archive:
        binary = any(name.endswith(".bin") for name in archive.names)
        found = {}
        for name in archive.names:
            if name.endswith(".bin") == binary:
                with archive.open(name) as file:
                    where = f"{path}: {name}"
                    found[name] = (
                        _from_binary(file.read(), where) if binary else _from_pickle(file, where)
                    )
    if not found:
        raise ValueError(
            SET.advice(f"{path} holds no {BATCHES[split][0]}.bin or {BATCHES[split][0]}")
        )
    batches = [found[name] for name in both if name in found]
    planes, labels = (np.concatenate(column) for column in zip(*batches))
    if labels.max() >= len(CLASSES):
        raise ValueError(
            f"{path}: a label is {labels.max()}, but CIFAR-10's are 0 to 9 (CIFAR-100 has another "
            "form)"
        )
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _from_binary(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 3072] and labels uint8 [n] of rows of 1 + 3072 bytes."""
    if not data or len(data) % (1 + PIXELS):
        raise ValueError(
            f"{where} has {len(data)} bytes, which is no multiple of {1 + PIXELS}: download it "
            "again"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


def _from_pickle(file, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 3072] and labels uint8 [n]."""
    batch = load_batch(file, where)
    data, labels = batch.get("data"), batch.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (PIXELS,):
        raise ValueError(f"{where} holds no 'data' of uint8 [n, {PIXELS}]")
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(label in range(256) for label in labels)
    ):
        raise ValueError(
            f"{where} holds no 'labels', one number for each of its {len(data)} images"
        )
    return data, np.array(labels, dtype=np.uint8)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; what is finished is left as it is."""
    parser = SET.parser(__doc__)
    parser.add_argument(
        "--split", choices=("train", "test"), default="train", help="which images (default train)"
    )
    args = parser.parse_args(argv)
    images, labels = read_split(SET.find(args.source), args.split)
    n = SET.check(len(images), args.allow_partial, COUNTS[args.split])
    record = f"cifar10{'-test' if args.split == 'test' else ''} 32x32x3"
    folder = os.path.join(args.out, args.split)
    if not is_finished(folder, n, record):
        items = ((image, CLASSES[label]) for image, label in zip(images, labels))
        bar = tqdm(items, folder, n, unit="img", disable=None)
        write_image_folder(folder, bar, 5, record)
    print(f"{folder}: {n:,} images in {len(CLASSES)} classes")
    if args.split == "train":
        packed = os.path.join(args.out, TRAIN)
        if not is_finished(packed, n, record):
            pack_images(packed, ImageSet(open_with_classes(folder), (32, 32), 3))
        print(f"{packed}: the same images, decoded")
        reference = os.path.join(args.out, REFERENCE)
        if not is_finished(reference, n, record):
            write_image_npz(reference, images, images.shape, preprocessing=record)
        print(f"{reference}: the whole training set")


if __name__ == "__main__":
    command(main)
