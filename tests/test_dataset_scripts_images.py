"""The scripts in datasets/ that scale pictures (LSUN, CelebA, FFHQ), on small sources of the published forms."""
import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dataset_tools import PARTIAL, ROOT, arrays, contents, into_zip, pixels, run, script
from guided_diffusion_ip.data.dataset_prep import reference_rows
from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.data.image_io import center_crop_arr

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
        assert np.array_equal(row, center_crop_arr(Image.open(data).convert("RGB"), 64))
    assert str(made["preprocessing"]) == "lsun-tower > crop=center resize=box+bicubic 64x64x3"
    assert os.path.samefile(tmp_path / "out" / "train.npz", tmp_path / "out" / "reference.npz")  # 7 are fewer than 50,000
    with pytest.raises(ValueError, match="found 7 images, published are 708,264"):
        run("lsun_tower", "--source", tmp_path / "downloads", "--out", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"pip install lmdb \(or the extra \[lsun\]\)$"):
        run("lsun_tower", "--source", tmp_path / "downloads", "--out", tmp_path / "out", PARTIAL)


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
    raw = next(load_data(data_dir=source, batch_size=6, image_size=64, random_flip=False, deterministic=True))[0]
    assert np.array_equal(((raw + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), center["arr_0"])
    for row, image in zip(center["arr_0"], originals):
        halved = image.resize((89, 109), Image.Resampling.BOX).resize((64, 78), Image.Resampling.BICUBIC)
        assert np.array_equal(row, np.asarray(halved)[7:71])
    for row, image in zip(none["arr_0"], originals):
        assert np.array_equal(row, np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)))
    assert str(center["preprocessing"]) == "celeba-align-jpg > crop=center resize=box+bicubic 64x64x3"
    assert str(none["preprocessing"]) == "celeba-align-jpg > crop=none resize=bicubic 64x64x3"
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_celeba64_killed_and_continued(tmp_path):
    """A pipe among the images stops the script in the middle of its work; there it is killed."""
    celeba(tmp_path / "s", 60)
    run("celeba64", "--source", tmp_path / "s", "--out", tmp_path / "whole", PARTIAL)
    stuck, data = tmp_path / "s" / "000041.jpg", (tmp_path / "s" / "000041.jpg").read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)
    out, pieces = tmp_path / "out", tmp_path / "out" / ".parts" / "train"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "datasets" / "celeba64.py"), "--source", str(tmp_path / "s"), "--out", str(out), PARTIAL],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not (pieces / "00000038.npz").exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert os.listdir(out) == [".parts"] and len(list(pieces.glob("*.npz"))) == 20
    begun = {path: path.stat().st_mtime_ns for path in pieces.glob("*.npz")}
    stuck.unlink()
    stuck.write_bytes(data[:len(data) // 3])
    argv = ("--source", tmp_path / "s", "--out", out, PARTIAL)
    with pytest.raises(ValueError, match=r"000041\.jpg cannot be read as an image.*repair or remove"):
        run("celeba64", *argv)
    assert {path: path.stat().st_mtime_ns for path in begun} == begun and os.listdir(out) == [".parts"]
    stuck.write_bytes(data)
    run("celeba64", *argv)
    assert contents(out) == contents(tmp_path / "whole")


def test_celeba64_errors(tmp_path):
    celeba(tmp_path / "s", 3)
    with pytest.raises(ValueError, match="found 3 images, published are 202,599: the download is not complete"):
        run("celeba64", "--source", tmp_path / "s", "--out", tmp_path / "out")
    Image.new("RGB", (178, 217)).save(tmp_path / "s" / "000009.jpg")
    with pytest.raises(ValueError, match=r"000009\.jpg is 178 x 217, but the aligned images are 178 x 218"):
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
    assert str(made["preprocessing"]) == {1024: "ffhq-images1024x1024 > crop=center resize=box+bicubic 128x128x3",
                                          128: "ffhq-thumbnails128x128 128x128x3"}[side]
    assert os.path.samefile(tmp_path / "out" / "train.npz", tmp_path / "out" / "reference.npz")
    run("ffhq128", "--source", tmp_path / "s", "--out", tmp_path / "few", PARTIAL, "--reference_count", 2)
    assert np.array_equal(arrays(tmp_path / "few" / "reference.npz")["arr_0"], made["arr_0"][reference_rows(4, 2)])


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
        run("ffhq128", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL, "--reference_count", -1)
