"""pack_images: a folder decoded once into a mapped npz, which trains exactly as the folder does; and
benchmark/loader.py.
"""

import os
import runpy
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.data.image_io import save_grid
from guided_diffusion_ip.data.image_set import ImageSet
from guided_diffusion_ip.data.preprocessing import recorded
from guided_diffusion_ip.data.sources import open_source
from guided_diffusion_ip.preparation import writers
from guided_diffusion_ip.preparation.writers import open_with_classes, pack_images
from tools.benchmark import loader

ROOT = Path(__file__).resolve().parent.parent


def pictures(n=23, height=12, width=10, channels=3):
    return np.random.default_rng(3).integers(0, 256, (n, height, width, channels), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 PNGs of 12 x 10 in bee (1) and ant (0)."""
    root = tmp_path_factory.mktemp("images")
    for k, image in enumerate(pictures()):
        place = root / ("bee" if k % 3 else "ant")
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{k:03d}.png")
    return root


@pytest.fixture
def npz_to_png(monkeypatch, capfd):
    """The script, in this process: (exit code, what it said)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["npz_to_png.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / "npz_to_png.py"), run_name="__main__")
        return end.value.code, "".join(capfd.readouterr())

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    return run


def same_batches(one, other, steps):
    for step in steps:
        if step is not None:
            one.seek(step)
            other.seek(step)
        (x, c), (y, d) = next(one), next(other)
        assert (
            torch.equal(x, y)
            and c.keys() == d.keys()
            and all(torch.equal(c[name], d[name]) for name in c)
        )


def test_the_command_makes_what_trains_like_the_folder(folder, tmp_path, npz_to_png):
    out = tmp_path / "new" / "set.npz"
    code, said = npz_to_png(folder, "--out", out, "--image_size", "8")
    assert code == 0 and "23 of 23 images, 8 x 8 x 3" in said
    assert os.listdir(out.parent) == ["set.npz"]
    for options in (
        dict(),
        dict(seed=7, rank=1, world=2),
        dict(class_cond=True, random_flip=False, deterministic=True),
        dict(class_cond=True, num_classes=2, class_dropout=0.3),
        dict(prefetch=True, start_step=4),
    ):
        streams = [
            load_data(data_dir=data, batch_size=9, image_size=8, **options)
            for data in (folder, out)
        ]
        assert isinstance(streams[1]._maker.memory.base, np.memmap), "the pixels were copied"
        same_batches(*streams, (None, None, None, 40, None, 3))  # 9 a batch: epochs end within
        assert (
            streams[0].preprocessing == streams[1].preprocessing
            and streams[0].classes == streams[1].classes
        )
        assert torch.equal(*(stream.examples(30)[0] for stream in streams))
        for stream in streams:
            stream.close()
    code, said = npz_to_png(folder, "--out", out, "--image_size", "8")
    assert code == 2 and "is there already" in said


def test_pictures_are_sorted_and_captioned_by_the_names_of_their_classes(
    folder, tmp_path, npz_to_png
):
    assert npz_to_png(folder, "--out", tmp_path / "set.npz")[0] == 0
    assert npz_to_png(tmp_path / "set.npz", "--out", tmp_path / "pictures")[0] == 0
    assert sorted(os.listdir(tmp_path / "pictures")) == ["ant", "bee"]
    assert npz_to_png(tmp_path / "pictures", "--out", tmp_path / "again.npz")[0] == 0
    # Samples have their names in settings.yaml; a label without a name keeps its number.
    run = tmp_path / "run"
    run.mkdir()
    np.savez(run / "samples.npz", arr_0=pictures()[:4], arr_1=np.array([1, 0, 2, 1]))
    (run / "settings.yaml").write_text("classes: [ant, bee]\n")
    assert npz_to_png(run / "samples.npz", "--out", run / "pictures")[0] == 0
    assert (
        sorted(os.listdir(run / "pictures")) == ["2", "ant", "bee"]
        and len(os.listdir(run / "pictures" / "bee")) == 2
    )
    assert npz_to_png(run / "samples.npz", "--out", run / "grid.png")[0] == 0
    save_grid(pictures()[:4], run / "expected.png", captions=["bee", "ant", "2", "bee"])
    assert (run / "grid.png").read_bytes() == (run / "expected.png").read_bytes()


def test_workers_make_the_same_file_as_this_process(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        writers, "_WORKER_BYTES", 4 * 12 * 10 * 3
    )  # six chunks, the last of three images
    for name, workers in (("a.npz", 0), ("b.npz", 2)):
        assert pack_images(
            tmp_path / name, ImageSet(open_with_classes(folder), None, 3), workers=workers
        ) == (23, 12, 10, 3)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as arrays:
        order = [int(path.stem) for path in sorted(folder.rglob("*.png"))]
        assert np.array_equal(arrays["arr_0"], pictures()[order])
        assert (
            arrays["arr_1"].tolist() == [int(k % 3 > 0) for k in order]
            and arrays["arr_1"].dtype == np.int64
        )
        assert arrays["classes"].tolist() == ["ant", "bee"] and "preprocessing" not in arrays


def test_pixels_as_they_are_can_be_cropped_at_random(folder, tmp_path):
    pack_images(tmp_path / "a.npz", ImageSet(open_with_classes(folder), None, 3))
    streams = [
        load_data(data_dir=data, batch_size=5, image_size=8, random_crop=True, num_workers=0)
        for data in (folder, tmp_path / "a.npz")
    ]
    same_batches(*streams, (None, None, 11))


def test_zip_count_channels_and_no_classes(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in folder.rglob("*.png"):
            file.write(path, path.name)  # flat: no classes
        file.writestr("preprocessing.txt", "mine")
    source = open_with_classes(tmp_path / "a.zip")
    assert source.labels is None
    assert pack_images(tmp_path / "a.npz", ImageSet(source, (8, 8), 1), count=5) == (5, 8, 8, 1)
    assert recorded(tmp_path / "a.npz") == "mine > crop=center resize=box+bicubic 8x8x1"
    with np.load(tmp_path / "a.npz") as arrays:
        assert sorted(arrays.files) == ["arr_0", "preprocessing"]
    streams = [
        load_data(
            data_dir=tmp_path / name, batch_size=5, image_size=8, channels=1, deterministic=True
        )
        for name in ("a.zip", "a.npz")
    ]
    assert torch.equal(*(next(stream)[0] for stream in streams))
    with pytest.raises(ValueError, match="holds no images"):
        open_with_classes(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_fit_is_named_and_nothing_is_left(
    folder, tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(writers, "_WORKER_BYTES", 4 * 12 * 10 * 3)
    there = tmp_path / "set"
    there.mkdir()
    for k, image in enumerate(pictures(20)):
        Image.fromarray(image).save(there / f"{k:02d}.png")

    def complaint(**options):
        with pytest.raises(ValueError, match="^[^\n]*$") as caught:
            pack_images(
                tmp_path / "a.npz",
                ImageSet(open_source(there, False), **{"size": None, "channels": 3} | options),
                workers=workers,
            )
        assert os.listdir(tmp_path) == ["set"]
        return str(caught.value)

    Image.fromarray(pictures(1, 12, 11)[0]).save(there / "17.png")
    assert "17.png is 12 x 11, but 00.png is 12 x 10: give an image size" in complaint()
    (there / "17.png").write_bytes((there / "16.png").read_bytes()[:99])
    assert "17.png cannot be read as an image" in complaint(size=(8, 8))
    assert "00.png has colours, the first images have none: do that" in complaint(
        channels=1, grey_remedy="do that"
    )


def test_grey_pictures_give_one_channel_unless_a_later_one_has_colours(tmp_path, npz_to_png):
    there = tmp_path / "set"
    there.mkdir()
    for k, image in enumerate(pictures(20)):
        Image.fromarray(image).convert("L").save(there / f"{k:02d}.png")
    code, said = npz_to_png(there, "--out", tmp_path / "grey.npz")
    assert code == 0 and "12 x 10 x 1" in said
    Image.fromarray(pictures(1)[0]).save(there / "18.png")
    code, said = npz_to_png(there, "--out", tmp_path / "a.npz")
    assert code == 2 and "18.png has colours" in said and "--channels 3" in said
    code, said = npz_to_png(
        there, "--out", tmp_path / "a.npz", "--channels", "3", "--classes", "False"
    )
    assert code == 0 and "20 of 20 images, 12 x 10 x 3" in said


@pytest.mark.parametrize(
    "classes", [np.array(["ant"]), np.array([0, 1]), np.array([["ant", "bee"]])]
)
def test_names_that_do_not_fit_the_labels(tmp_path, classes):
    np.savez(tmp_path / "a.npz", arr_0=pictures(2), arr_1=[0, 1], classes=classes)
    with pytest.raises(ValueError, match=r"a\.npz: classes is .*must be texts \[2\] or more"):
        open_source(tmp_path / "a.npz", class_cond=True)
    assert len(open_source(tmp_path / "a.npz", class_cond=False)) == 2


# ---- the loader's benchmark ----


def test_rates_of_all_ways(folder):
    rows = loader.measure_loader(
        folder, batch_size=4, image_size=8, seconds=0.02, repeats=2, num_workers=1
    )
    assert [row.what for row in rows] == [
        loader.PUBLISHED,
        loader.FOLDER,
        loader.CACHED,
        loader.MAPPED,
    ]
    assert all(len(row.rates) == 2 and min(row.rates) > 0 for row in rows)
    lines = loader.table(rows).splitlines()
    assert len(lines) == 6 and "| 1.0 |" in lines[2]


def test_the_published_way_hands_out_the_same_images(folder):
    batch = next(loader.published_batches(folder, 23, 8))
    ours, _ = next(
        load_data(
            data_dir=folder, batch_size=23, image_size=8, random_flip=False, deterministic=True
        )
    )
    assert batch.shape == ours.shape and batch.dtype == torch.float32
    found = {
        k
        for k in range(23)
        for image in batch
        if torch.equal(image, ours[k]) or torch.equal(image, ours[k].flip(-1))
    }
    assert found == set(range(23))
