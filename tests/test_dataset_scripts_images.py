"""The scripts in datasets/ that scale pictures (LSUN, CelebA, FFHQ), on small sources of the
published forms.
"""

import hashlib
import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from dataset_tools import PARTIAL, ROOT, arrays, contents, into_zip, pixels, run, script
from PIL import Image

from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.preparation.writers import reference_rows

# LSUN


def lsun(path, images):
    lmdb = pytest.importorskip("lmdb")
    kinds = ("WEBP", "JPEG")
    with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for k, image in enumerate(images):
            data = io.BytesIO()
            if isinstance(image, bytes):
                data.write(image)
            else:
                image.save(data, kinds[k % 2], quality=95)
            transaction.put(f"{(k * 7919) % 997:040x}".encode(), data.getvalue())


def test_lsun_tower(tmp_path, monkeypatch):
    images = [*pixels(4, 256, 341), *pixels(3, 300, 256, seed=1)]
    (tmp_path / "downloads").mkdir()
    lsun(tmp_path / "downloads" / "tower_train_lmdb", images)
    run("lsun_tower", "--source", tmp_path / "downloads", "--out", tmp_path / "out", PARTIAL)
    made = arrays(tmp_path / "out" / "train.npz")
    assert made["arr_0"].shape == (7, 64, 64, 3)
    order = sorted(range(7), key=lambda k: (k * 7919) % 997)
    assert order != list(range(7))
    for row, k in zip(made["arr_0"], order):
        data = io.BytesIO()
        images[k].save(data, ("WEBP", "JPEG")[k % 2], quality=95)
        image = Image.open(data).convert("RGB")
        once = image.resize((85, 64) if k < 4 else (64, 75), Image.Resampling.BOX)
        left, top = (10, 0) if k < 4 else (0, 5)
        assert np.array_equal(row, np.asarray(once)[top : top + 64, left : left + 64])
    assert str(made["preprocessing"]) == "lsun-tower > crop=center resize=box 64x64x3"
    assert os.path.samefile(
        tmp_path / "out" / "train.npz", tmp_path / "out" / "reference.npz"
    )  # 7 are fewer than 50,000
    with pytest.raises(ValueError, match="found 7 images, published are 708,264"):
        run("lsun_tower", "--source", tmp_path / "downloads", "--out", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"pip install lmdb \(or the extra \[lsun\]\)$"):
        run("lsun_tower", "--source", tmp_path / "downloads", "--out", tmp_path / "out", PARTIAL)


def test_lsun_pixels_are_means_of_4x4_rounded_once_and_the_piece_is_the_middle_one():
    render, numbers = script("lsun_tower").render, np.random.default_rng(0)
    image = numbers.integers(
        0, 256, (256, 354, 3), np.uint8
    )  # 354 / 4 = 88.5 columns, rounded to the even 88
    assert np.array_equal(
        render(Image.fromarray(image), ""),
        np.asarray(Image.fromarray(image).resize((88, 64), Image.Resampling.BOX))[:, 12:76],
    )
    means = image[:, :256].reshape(64, 4, 64, 4, 3).mean((1, 3))
    error = render(Image.fromarray(image[:, :256]), "") - means
    assert (
        abs(error).max() <= 1 and error.mean() < 0.3
    )  # Pillow rounds halves up; halved twice, errors are 1 on average


def test_a_damaged_image_in_lsun_is_named_by_its_key(tmp_path):
    lsun(tmp_path / "s", [*pixels(2, 64, 80), b"no image"])
    key = f"{(2 * 7919) % 997:040x}"
    with pytest.raises(ValueError, match=f"s: key {key} cannot be read as an image"):
        run("lsun_tower", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL)
    assert not (tmp_path / "out" / "train.npz").exists()


# CelebA


def celeba(folder, n, seed=0):
    folder.mkdir(parents=True)
    for k, image in enumerate(pixels(n, 218, 178, seed)):
        image.save(folder / f"{k + 1:06d}.jpg", quality=95)


def bilinear(pixels):
    """float64 [64, 64, C] of [H, W, C]: values at the middles of 64 x 64 fields, between the pixels
    around them only.
    """
    for axis in (0, 1):
        n = pixels.shape[axis]
        places = (np.arange(64) + 0.5) / 64 * n - 0.5
        pixels = np.apply_along_axis(
            lambda line: np.interp(places, np.arange(n), line), axis, pixels
        )
    return pixels


def squeeze(pixels):
    return script("celeba64").squeezed(Image.fromarray(pixels.astype(np.uint8)), "x").astype(float)


def test_celeba64_squeezed_images_are_bilinear_and_aliased():
    y, x = np.mgrid[:218, :178].astype(float)
    x_made, y_made = np.meshgrid(
        (np.arange(64) + 0.5) * 178 / 64 - 0.5, (np.arange(64) + 0.5) * 218 / 64 - 0.5
    )
    ramp = np.stack([y, x, (x + y) / 2], axis=2)  # a bilinear image of a plane is the plane
    assert abs(squeeze(ramp) - np.stack([y_made, x_made, (x_made + y_made) / 2], axis=2)).max() <= 1
    assert (squeeze(np.full((218, 178, 3), 255)) == 255).all() and (
        squeeze(np.zeros((218, 178, 3))) == 0
    ).all()
    noise = np.random.default_rng(0).integers(0, 256, (218, 178, 3))
    assert abs(squeeze(noise) - bilinear(noise)).max() <= 1
    stripes = np.broadcast_to(
        255 * (np.arange(178)[:, None] % 2), (218, 178, 3)
    )  # averaged they would be grey
    made = squeeze(stripes)
    assert (
        np.ptp(made, axis=0).max() <= 1 and made.min() < 10 and made.max() > 245 and made.std() > 70
    )


def test_celeba64_squeezed_images_are_opencvs_to_the_bit():
    y, x, c = np.mgrid[:218, :178, :3]
    pixels = (x * x * 7 + y * 13 + c * 31 + x * y) % 256
    made = squeeze(pixels).astype(
        np.uint8
    )  # the sha256 is that of cv2.resize(pixels, (64, 64)) of OpenCV 5.0.0
    assert (
        hashlib.sha256(made.tobytes()).hexdigest()
        == "137508ac55e179a642eeb51da50b6976cf474fcd397a3c3b202f1e61e31d8225"
    )
    assert made[0, :3].tolist() == [[23, 54, 85], [116, 147, 178], [60, 92, 123]]


def test_celeba64_ddims_crop(tmp_path):
    celeba(tmp_path / "s", 4)
    run(
        "celeba64", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL, "--crop", "ddim"
    )
    made = arrays(tmp_path / "out" / "train.npz")
    for row, path in zip(made["arr_0"], sorted((tmp_path / "s").iterdir()), strict=True):
        face = np.asarray(Image.open(path))[57:185, 25:153]
        assert np.array_equal(
            row, np.asarray(Image.fromarray(face).resize((64, 64), Image.Resampling.BILINEAR))
        )
    assert (
        str(made["preprocessing"])
        == "celeba-align-jpg > crop=128-at-89,121 resize=bilinear 64x64x3"
    )


@pytest.mark.parametrize("packed", [False, True])
def test_celeba64(tmp_path, packed):
    celeba(tmp_path / "s" / "img_align_celeba", 6)
    source = tmp_path / "s"
    if packed:
        into_zip(tmp_path / "img_align_celeba.zip", contents(tmp_path / "s"))
        source = tmp_path / "img_align_celeba.zip"
    originals = [Image.open(path) for path in sorted((tmp_path / "s").rglob("*.jpg"))]
    run("celeba64", "--source", source, "--out", tmp_path / "center", PARTIAL)
    run("celeba64", "--source", source, "--out", tmp_path / "none", PARTIAL, "--crop", "none")
    center, none = (arrays(tmp_path / name / "train.npz") for name in ("center", "none"))
    # What the training loader makes of the originals.
    raw = next(
        load_data(
            data_dir=source, batch_size=6, image_size=64, random_flip=False, deterministic=True
        )
    )[0]
    assert np.array_equal(
        ((raw + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), center["arr_0"]
    )
    for row, image in zip(center["arr_0"], originals):
        halved = image.resize((89, 109), Image.Resampling.BOX).resize(
            (64, 78), Image.Resampling.BICUBIC
        )
        assert np.array_equal(row, np.asarray(halved)[7:71])
    for row, image in zip(none["arr_0"], originals):
        assert abs(row - bilinear(np.asarray(image))).max() <= 1
    assert (
        str(center["preprocessing"]) == "celeba-align-jpg > crop=center resize=box+bicubic 64x64x3"
    )
    assert (
        str(none["preprocessing"])
        == "celeba-align-jpg > crop=none resize=bilinear-without-antialias 64x64x3"
    )
    for name in ("train.npz", "reference.npz"):
        stream = load_data(data_dir=tmp_path / "none" / name, batch_size=1, image_size=64)
        assert stream.preprocessing == str(none["preprocessing"])
    with pytest.raises(ValueError, match="is another set"):
        run("celeba64", "--source", source, "--out", tmp_path / "center", PARTIAL, "--crop", "none")


def test_celeba64_reference_is_a_fixed_random_part(tmp_path, monkeypatch):
    celeba(tmp_path / "s", 12)
    module = script("celeba64")
    monkeypatch.setattr(module, "REFERENCE_COUNT", 5)
    for name in ("a", "b"):
        module.main(["--source", str(tmp_path / "s"), "--out", str(tmp_path / name), PARTIAL])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    train, reference = (arrays(tmp_path / "a" / f"{name}.npz") for name in ("train", "reference"))
    assert np.array_equal(reference["arr_0"], train["arr_0"][reference_rows(12, 5)])
    assert str(reference["preprocessing"]) == str(train["preprocessing"])


# A script that stops for a minute when it comes to one of the images.
STUCK = """
import runpy, sys, time
from guided_diffusion_ip.data import sources
read = sources.read_image
def slow(path, channels):
    time.sleep(60 * path.endswith("000041.jpg"))
    return read(path, channels)
sources.read_image = slow
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_celeba64_killed_and_begun_anew(tmp_path):
    """A pipe among the images stops the script in the middle of its work; there it is killed."""
    celeba(tmp_path / "s", 60)
    run("celeba64", "--source", tmp_path / "s", "--out", tmp_path / "whole", PARTIAL)
    stuck, data = tmp_path / "s" / "000041.jpg", (tmp_path / "s" / "000041.jpg").read_bytes()
    out = tmp_path / "out"
    making = out / ".train.npz.making"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            STUCK,
            str(ROOT / "datasets" / "celeba64.py"),
            "--source",
            str(tmp_path / "s"),
            "--out",
            str(out),
            PARTIAL,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 60
    while not making.exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert sorted(os.listdir(out)) == [making.name, f"{making.name}.lock"]
    stuck.write_bytes(data[: len(data) // 3])
    argv = ("--source", tmp_path / "s", "--out", out, PARTIAL)
    with pytest.raises(
        ValueError, match=r"000041\.jpg cannot be read as an image.*repair or remove"
    ):
        run("celeba64", *argv)
    assert os.listdir(out) == []
    stuck.write_bytes(data)
    run("celeba64", *argv)
    assert contents(out) == contents(tmp_path / "whole")


def test_celeba64_errors(tmp_path):
    celeba(tmp_path / "s", 3)
    with pytest.raises(
        ValueError, match="found 3 images, published are 202,599: the download is not complete"
    ):
        run("celeba64", "--source", tmp_path / "s", "--out", tmp_path / "out")
    Image.new("RGB", (178, 217)).save(tmp_path / "s" / "000009.jpg")
    with pytest.raises(
        ValueError, match=r"000009\.jpg is 178 x 217, but the aligned images are 178 x 218"
    ):
        run("celeba64", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL)


# FFHQ


@pytest.mark.parametrize("side, folder", [(1024, "images1024x1024"), (128, "thumbnails128x128")])
def test_ffhq128(tmp_path, side, folder):
    images = pixels(4, side, side)
    for k, image in enumerate(images):
        place = tmp_path / "s" / folder / f"{k // 2 * 1000:05d}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{k:05d}.png", compress_level=1)
    run("ffhq128", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL)
    made = arrays(tmp_path / "out" / "train.npz")
    for row, image in zip(made["arr_0"], images):
        while image.width > 128:
            image = image.resize((image.width // 2,) * 2, Image.Resampling.BOX)
        assert np.array_equal(row, np.asarray(image))
    assert (
        str(made["preprocessing"])
        == {
            1024: "ffhq-images1024x1024 > crop=center resize=box+bicubic 128x128x3",
            128: "ffhq-thumbnails128x128 128x128x3",
        }[side]
    )
    assert os.path.samefile(tmp_path / "out" / "train.npz", tmp_path / "out" / "reference.npz")
    run(
        "ffhq128",
        "--source",
        tmp_path / "s",
        "--out",
        tmp_path / "few",
        PARTIAL,
        "--reference_count",
        2,
    )
    assert np.array_equal(
        arrays(tmp_path / "few" / "reference.npz")["arr_0"], made["arr_0"][reference_rows(4, 2)]
    )


def test_ffhq128_takes_the_thumbnails_where_both_are(tmp_path):
    for side, folder in ((1024, "images1024x1024"), (128, "thumbnails128x128")):
        (tmp_path / folder).mkdir()
        pixels(1, side, side)[0].save(tmp_path / folder / "00000.png", compress_level=1)
    run("ffhq128", "--source", tmp_path, "--out", tmp_path / "out", PARTIAL)
    assert (
        str(arrays(tmp_path / "out" / "train.npz")["preprocessing"])
        == "ffhq-thumbnails128x128 128x128x3"
    )


def test_ffhq128_errors(tmp_path):
    into = tmp_path / "s" / "00000"
    into.mkdir(parents=True)
    for name, side in (("0.png", 128), ("1.png", 256)):
        Image.new("RGB", (side, side)).save(into / name)
    with pytest.raises(ValueError, match="found 2 images, published are 70,000"):
        run("ffhq128", "--source", tmp_path / "s", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="1.png is 256 x 256, but the first image is 128 x 128"):
        run("ffhq128", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL)
    (into / "0.png").unlink()
    with pytest.raises(ValueError, match="1.png is 256 wide; expected are 1024 or 128"):
        run("ffhq128", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL)
    with pytest.raises(ValueError, match="-1 reference images"):
        run(
            "ffhq128",
            "--source",
            tmp_path / "s",
            "--out",
            tmp_path / "out",
            PARTIAL,
            "--reference_count",
            -1,
        )
