"""writers.py: sets that are whole or not there, and reference images that are always the same."""

import io
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from guided_diffusion_ip.data.preprocessing import recorded
from guided_diffusion_ip.preparation import writers as dataset_prep
from guided_diffusion_ip.preparation.writers import (
    is_finished,
    reference_rows,
    render_npz,
    write_image_folder,
    write_image_npz,
    write_reference,
)


def pictures(n):
    return np.random.default_rng(0).integers(0, 256, (n, 4, 5, 3), np.uint8)


def source(n, broken=()):
    """A source of n images which notes what it is asked for; those in `broken` cannot be read."""
    asked = []

    def image(i, channels):
        asked.append(i)
        if i in broken:
            raise ValueError(f"{i}.png cannot be read as an image")
        return Image.fromarray(pictures(n)[i])

    class Listed(SimpleNamespace):
        def __len__(self):
            return n

    return Listed(names=[f"{i}.png" for i in range(n)], image=image, asked=asked)


def render(image, name):
    return np.asarray(image)


def test_an_interrupted_folder_is_not_there_and_what_was_left_goes(tmp_path):
    def items(count):
        for k, image in enumerate(pictures(9)[:count]):
            yield image, "ab"[k % 2]
        if count < 9:
            raise RuntimeError("interrupted")

    out = tmp_path / "out" / "train"
    with pytest.raises(RuntimeError):
        write_image_folder(out, items(5), 5, "made so")
    assert not (tmp_path / "out").exists()
    left = tmp_path / "out" / ".train.making" / "set" / "a"  # of a process that was killed
    left.mkdir(parents=True)
    (left / "77777.png").write_bytes(b"of another set")
    assert write_image_folder(out, items(9), 5, "made so") == 9
    assert os.listdir(tmp_path / "out") == ["train"] and recorded(out) == "made so"
    assert len(list(out.rglob("*.png"))) == 9
    assert np.array_equal(Image.open(out / "b" / "00003.png"), pictures(9)[3])


def test_an_interrupted_npz_is_not_there_and_begins_anew(tmp_path):
    with pytest.raises(ValueError, match=r"^77.png cannot be read"):
        render_npz(str(tmp_path / "out"), source(120, {77}), render, (4, 5), "line 4x5x3")
    assert not (tmp_path / "out").exists()
    left = tmp_path / "out" / ".train.npz.making"
    left.mkdir(parents=True)
    (left / "train.npz").write_bytes(b"killed here")
    render_npz(str(tmp_path / "out"), source(120), render, (4, 5), "line 4x5x3")
    assert os.listdir(tmp_path / "out") == ["train.npz"]
    with np.load(tmp_path / "out" / "train.npz") as arrays:
        assert (
            np.array_equal(arrays["arr_0"], pictures(120))
            and str(arrays["preprocessing"]) == "line 4x5x3"
        )
    finished = source(120)
    render_npz(str(tmp_path / "out"), finished, render, (4, 5), "line 4x5x3")
    assert not finished.asked


def test_bar_shows_the_time_left(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    render_npz(str(tmp_path), source(120), render, (4, 5), "line")
    assert re.search(r"100%.* 120/120 \[\d\d:\d\d<\d\d:\d\d, .*img/s", terminal.getvalue())


def test_images_are_rendered_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_prep, "_CHUNK_BYTES", 2 * 4 * 5 * 3)
    images = source(500, {9})
    with pytest.raises(ValueError, match=r"^9.png"):
        render_npz(str(tmp_path), images, render, (4, 5), "line")
    assert max(images.asked) < 11
    render_npz(str(tmp_path), source(7), render, (4, 5), "line")
    with np.load(tmp_path / "train.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pictures(7))


def test_another_set_is_not_overwritten(tmp_path):
    render_npz(str(tmp_path), source(120), render, (4, 5), "line")
    for n, line in ((120, "other line"), (119, "line")):
        with pytest.raises(
            ValueError, match="is there already and is another set: 120 images, 'line'"
        ):
            render_npz(str(tmp_path), source(n), render, (4, 5), line)


def test_reference_rows_are_the_documented_ones():
    assert reference_rows(10, 4).tolist() == [0, 3, 4, 6]
    assert reference_rows(202_599, 50_000)[[0, 1, 2, -1]].tolist() == [0, 2, 3, 202596]
    rows = reference_rows(1000, 300)
    assert len(set(rows)) == 300 and (np.diff(rows) > 0).all() and rows.dtype == np.int64
    assert reference_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="0 reference images"):
        reference_rows(5, 0)


def test_reference_is_drawn_from_the_training_set_or_is_it(tmp_path, monkeypatch):
    write_image_npz(tmp_path / "train.npz", pictures(20), (20, 4, 5, 3), preprocessing="line")
    assert "6 images drawn from 20" in write_reference(str(tmp_path), 6, "line")
    with np.load(tmp_path / "reference.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pictures(20)[reference_rows(20, 6)])
    assert recorded(tmp_path / "reference.npz") == "line"
    assert "were there already" in write_reference(str(tmp_path), 6, "line")
    with pytest.raises(
        ValueError, match="reference.npz is there already and is another set: 6 images"
    ):
        write_reference(str(tmp_path), 20, "line")
    os.remove(tmp_path / "reference.npz")
    assert "another name of" in write_reference(str(tmp_path), 50, "line")
    assert os.path.samefile(tmp_path / "reference.npz", tmp_path / "train.npz")
    os.remove(tmp_path / "reference.npz")

    def no_links(*_):
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    assert write_reference(str(tmp_path), 20, "line").endswith(f"use {tmp_path / 'train.npz'}")
    assert os.listdir(tmp_path) == ["train.npz"]


def test_is_finished(tmp_path):
    (tmp_path / "empty").mkdir()
    assert not is_finished(str(tmp_path / "empty"), 3, "line") and not is_finished(
        str(tmp_path / "gone"), 3, "line"
    )
    write_image_folder(
        tmp_path / "set", ((image, None) for image in pictures(3)), preprocessing="line"
    )
    assert is_finished(str(tmp_path / "set"), 3, "line")
    write_image_npz(tmp_path / "a.npz", pictures(3), (3, 4, 5, 3))
    with pytest.raises(ValueError, match="3 images, 'of unknown making'; wanted are 3, 'line'"):
        is_finished(str(tmp_path / "a.npz"), 3, "line")
