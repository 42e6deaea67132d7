"""preprocessing.py: the line that says how images were made, where it is kept, and what the loader
makes of it.
"""

import os
import sys
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.data.image_set import open_image_set
from guided_diffusion_ip.data.preprocessing import as_array, of_loader, recorded
from guided_diffusion_ip.data.sources import open_source
from guided_diffusion_ip.preparation.writers import write_image_folder, write_image_npz

LINE = "faces > crop=center resize=box+bicubic 8x8x3"


def pictures(n=3, side=8):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)


@pytest.fixture
def places(tmp_path):
    """The same images as folder, zip, zip with one top folder, npz with a single text, npz with one
    row of text.
    """
    write_image_folder(
        tmp_path / "set",
        ((image, "ab"[k % 2]) for k, image in enumerate(pictures())),
        preprocessing=LINE,
    )
    for name, top in (("a.zip", ""), ("b.zip", "top/")):
        with zipfile.ZipFile(tmp_path / name, "w") as packed:
            for path in (tmp_path / "set").rglob("*.*"):
                packed.write(path, top + str(path.relative_to(tmp_path / "set")))
    write_image_npz(
        tmp_path / "a.npz", pictures(), (3, 8, 8, 3), labels=[0, 1, 0], preprocessing=LINE
    )
    np.savez_compressed(tmp_path / "b.npz", arr_0=pictures(), arr_1=[0, 1, 0], preprocessing=[LINE])
    return [tmp_path / name for name in ("set", "a.zip", "b.zip", "a.npz", "b.npz")]


def test_recorded_in_every_form_and_no_hindrance_to_training(places):
    for place in places:
        assert recorded(place) == recorded(str(place)) == LINE
        source = open_source(place, class_cond=True)
        assert source.preprocessing == LINE and len(source) == 3
        assert source.classes == (["0", "1"] if place.suffix == ".npz" else ["a", "b"])
        stream = load_data(data_dir=place, batch_size=3, image_size=8, class_cond=True)
        assert stream.preprocessing == LINE and next(stream)[0].shape == (3, 3, 8, 8)
        assert open_image_set(place, (8, 8), 3).preprocessing == LINE
        assert (
            open_image_set(place, (4, 8), 1).preprocessing
            == LINE + " > crop=center resize=box+bicubic 4x8x1"
        )
    with np.load(places[3], allow_pickle=False) as arrays:
        assert arrays["preprocessing"].shape == () and str(arrays["preprocessing"]) == LINE


def test_nothing_recorded(tmp_path):
    write_image_folder(tmp_path / "set", ((image, None) for image in pictures()))
    write_image_npz(tmp_path / "a.npz", pictures(), (3, 8, 8, 3))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.write(tmp_path / "set" / "0000.png", "deep/0000.png")
        packed.writestr("other/preprocessing.txt", "of a part only")
    assert not (tmp_path / "set" / "preprocessing.txt").exists()
    for name in ("set", "a.npz", "a.zip", "set/0000.png", "gone.npz", "gone"):
        assert recorded(tmp_path / name) == ""
    assert np.load(tmp_path / "a.npz").files == ["arr_0"]
    assert (
        load_data(data_dir=tmp_path / "a.npz", batch_size=1, image_size=8).preprocessing
        == "images 8x8x3"
    )


@pytest.mark.parametrize(
    "record, options, line",
    [
        (LINE, {}, LINE),
        (LINE, dict(stored_size=(8, 8, 3)), LINE),
        ("", {}, "images > crop=center resize=box+bicubic 8x8x3"),
        ("", dict(stored_size=(8, 8, 3)), "images 8x8x3"),
        ("", dict(stored_size=(8, 8, 1)), "images > crop=center resize=box+bicubic 8x8x3"),
        ("faces", dict(stored_size=(8, 8, 3)), "faces 8x8x3"),
        (
            "faces 16x16x3",
            dict(stored_size=(16, 16, 3)),
            "faces 16x16x3 > crop=center resize=box+bicubic 8x8x3",
        ),
        ("faces 18x8x3", {}, "faces 18x8x3 > crop=center resize=box+bicubic 8x8x3"),
        ("faces x8x8x3", {}, "faces x8x8x3 > crop=center resize=box+bicubic 8x8x3"),
        (LINE, dict(channels=1), LINE + " > crop=center resize=box+bicubic 8x8x1"),
        (
            LINE,
            dict(random_crop=True, stored_size=(8, 8, 3)),
            LINE + " > crop=random0.8-1 resize=box+bicubic 8x8x3",
        ),
    ],
)
def test_of_loader(record, options, line):
    assert of_loader(record, (8, 8), **({"channels": 3} | options)) == line
    if not options.get("random_crop"):  # saying it twice says no more
        assert of_loader(line, (8, 8), options.get("channels", 3)) == line


def test_the_line_is_right_where_it_claims_that_nothing_changes(places):
    """Pixels of a stored set whose line ends with the loader's size come out as they are."""
    for place in places:
        assert np.array_equal(
            np.sort(open_image_set(place, (8, 8), 3).pixels(range(3)), axis=0),
            np.sort(pictures(), axis=0),
        )


@pytest.mark.parametrize(
    "value",
    [
        np.array(3),
        np.array(["a", "b"]),
        np.array(b"text"),
        np.array("a\nb"),
        np.array(["made", None], dtype=object),
    ],
)
def test_no_line_of_text_in_an_npz(tmp_path, value):
    np.savez(tmp_path / "a.npz", arr_0=pictures(), preprocessing=value)
    with pytest.raises(ValueError, match=r"a\.npz: preprocessing (is|must|holds)"):
        open_source(tmp_path / "a.npz", class_cond=False)


def test_no_line_of_text_in_a_file(tmp_path):
    Image.fromarray(pictures()[0]).save(tmp_path / "1.png")
    for data, text in (
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a\nb", "one line"),
        (b"x" * 100_000, "one line"),
    ):
        (tmp_path / "preprocessing.txt").write_bytes(data)
        with pytest.raises(ValueError, match=f"preprocessing.txt .*{text}"):
            recorded(tmp_path)
    (tmp_path / "bad.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="bad.zip cannot be read"):
        recorded(tmp_path / "bad.zip")
    with pytest.raises(ValueError, match="one line"):
        as_array("a\nb")


def test_remote_folder(places, monkeypatch):
    folder = places[0]
    local = lambda path: str(path).replace("gs://bucket", str(folder))  # noqa: E731
    monkeypatch.setitem(
        sys.modules,
        "blobfile",
        types.SimpleNamespace(
            Error=ValueError,
            walk=lambda top: (
                (f"gs://bucket/{os.path.relpath(where, folder)}/".replace("/./", "/"), [], names)
                for where, _, names in os.walk(folder)
            ),
            exists=lambda path: os.path.exists(local(path)),
            BlobFile=lambda path, mode: open(local(path), mode),
        ),
    )
    assert recorded("gs://bucket") == recorded("gs://bucket/") == LINE
    assert open_source("gs://bucket", class_cond=False).preprocessing == LINE
    (folder / "preprocessing.txt").unlink()
    assert (
        recorded("gs://bucket") == open_source("gs://bucket", class_cond=False).preprocessing == ""
    )
