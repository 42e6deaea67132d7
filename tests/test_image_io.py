"""image_io.py and npz_io.py: quantisation, decoding, crops, npz streaming, PNG files."""

import io
import os
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_ip.data import image_io
from guided_diffusion_ip.data.image_io import (
    center_crop_arr,
    decode_image,
    random_crop_arr,
    save_grid,
    save_png,
    to_model_range,
    to_uint8,
)
from guided_diffusion_ip.data.npz_io import NpzReader, NpzWriter, merge_npz, write_npz


def read_npz_rows(path, key, start, stop):
    with NpzReader(path) as reader:
        return reader.rows(key, start, stop)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Quantisation


def test_model_range_and_layout():
    images = pixels(2, 3, 5, 4)
    x = to_model_range(images)
    assert x.shape == (2, 4, 3, 5) and x.dtype == torch.float32 and x.is_contiguous()
    assert np.array_equal(x.numpy(), images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    assert torch.equal(x, to_model_range(torch.from_numpy(images)))
    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(x, to_model_range(images))
    for bad in (images.astype(np.float32), images[0]):
        with pytest.raises(ValueError, match="uint8"):
            to_model_range(bad)


@pytest.mark.parametrize(
    "value, byte",
    [
        (-1.0, 0),
        (1.0, 255),
        (-7.0, 0),
        (3.0, 255),
        (float("inf"), 255),
        (-float("inf"), 0),
        (0.0, 127),
        (1.01 / 127.5 - 1, 1),
        (1.99 / 127.5 - 1, 1),
        (254.99 / 127.5 - 1, 254),
        (0.5, 191),
        (-0.5, 63),
    ],
)
def test_quantisation_truncates(value, byte):
    assert to_uint8(torch.full((1, 1, 1, 1), value)).item() == byte


def test_quantisation_round_trip():
    """A byte comes back as itself, or as one less where float32 falls just below it (63 of 256)."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    x = to_model_range(levels)
    lost = levels.int() - to_uint8(x).int()
    one = np.float32(1)
    expected = (((levels.numpy() / np.float32(127.5) - one) + one) * np.float32(127.5)).astype(int)
    assert np.array_equal(to_uint8(x), expected) and lost.unique().tolist() == [0, 1]
    assert lost.sum() == 63
    assert torch.equal(to_uint8(x + 0.5 / 127.5), levels)


@pytest.mark.parametrize(
    "value, byte",
    [
        (-1.0, 0),
        (1.0, 255),
        (-7.0, 0),
        (3.0, 255),
        (float("inf"), 255),
        (-float("inf"), 0),
        (0.0, 128),
        (0.49 / 127.5 - 1, 0),
        (0.51 / 127.5 - 1, 1),
        (1.49 / 127.5 - 1, 1),
        (254.51 / 127.5 - 1, 255),
    ],
)
def test_quantisation_rounds_if_asked_to(value, byte):
    assert to_uint8(torch.full((1, 1, 1, 1), value), rounded=True).item() == byte


def test_rounded_bytes_come_back_as_themselves_and_truncated_ones_half_a_level_darker():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    x = to_model_range(levels)
    for off in (-0.49, 0, 0.49):
        assert torch.equal(to_uint8(x + off / 127.5, rounded=True), levels)
    fine = torch.linspace(-1, 1, 255 * 100 + 1).reshape(1, 1, 1, -1)
    exact = (fine + 1) * 127.5
    assert abs(float((to_uint8(fine, rounded=True).flatten() - exact.flatten()).mean())) < 0.01
    assert abs(float((to_uint8(fine).flatten() - exact.flatten()).mean()) + 0.5) < 0.01


def test_to_uint8_layout_precision_and_errors():
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    out = to_uint8(x)
    assert out.shape == (2, 4, 5, 3) and out.dtype == torch.uint8 and out.is_contiguous()
    expected = np.clip((x.numpy() + 1) * np.float32(127.5), 0, 255).astype(np.uint8)
    assert np.array_equal(out.numpy(), expected.transpose(0, 2, 3, 1))
    assert torch.equal(to_uint8(x.bfloat16()), to_uint8(x.bfloat16().float()))
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 2 images contain NaN"):
        to_uint8(x)


# Decoding


def every_mode():
    """(name, file bytes, expected RGBA of the top left pixel)."""
    two = lambda mode, colour: Image.new(mode, (3, 2), colour)  # noqa: E731
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50] + [0] * 762)
    frames = [two("RGB", (255, 0, 0)), two("RGB", (0, 0, 255))]
    grey16 = Image.fromarray(np.full((2, 3), 25700, dtype=np.uint16))
    yield "grey", encode(two("L", 77)), (77, 77, 77, 255)
    yield "one bit", encode(two("1", 1)), (255, 255, 255, 255)
    yield "grey and alpha", encode(two("LA", (77, 5))), (77, 77, 77, 5)
    yield "16 bit", encode(grey16), (100, 100, 100, 255)
    yield "16 bit tiff", encode(grey16, "TIFF"), (100, 100, 100, 255)
    yield "white 16 bit", encode(Image.fromarray(np.full((2, 3), 65535, np.uint16))), (255,) * 4
    yield "rgb", encode(two("RGB", (1, 2, 3))), (1, 2, 3, 255)
    yield "rgba", encode(two("RGBA", (1, 2, 3, 4))), (1, 2, 3, 4)
    yield "palette", encode(palette), (200, 100, 50, 255)
    yield "transparent palette", encode(palette, transparency=bytes([255, 40])), (200, 100, 50, 40)
    yield "cmyk", encode(two("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0, 255)
    yield "gif", encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), (255, 0, 0, 255)
    yield "webp", encode(two("RGB", (1, 2, 3)), "WEBP", lossless=True), (1, 2, 3, 255)
    yield "bmp", encode(two("RGB", (1, 2, 3)), "BMP"), (1, 2, 3, 255)


@pytest.mark.parametrize("name, data, rgba", [pytest.param(*m, id=m[0]) for m in every_mode()])
def test_every_mode_becomes_1_3_and_4_channels(name, data, rgba):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = {c: np.asarray(decode_image(data, c, name)) for c in (1, 3, 4)}
    assert images[4].shape == (2, 3, 4) and tuple(images[4][0, 0].tolist()) == rgba
    assert images[3].shape == (2, 3, 3) and tuple(images[3][0, 0].tolist()) == rgba[:3]
    luma = 0.299 * rgba[0] + 0.587 * rgba[1] + 0.114 * rgba[2]
    assert images[1].shape == (2, 3) and abs(int(images[1][0, 0]) - luma) <= 1


def test_16_bits_are_scaled_not_clipped():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    got = np.asarray(decode_image(encode(Image.fromarray(ramp)), 1, "ramp"))
    assert np.array_equal(got, np.arange(256, dtype=np.uint8).reshape(16, 16))


def test_exif_orientation_is_left_alone(tmp_path):
    image, exif = Image.new("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode_image(tmp_path / "a.jpg", 3, "a.jpg").size == (6, 4)


def damaged():
    good = encode(Image.fromarray(pixels(64, 64, 3)))
    jpeg = encode(Image.fromarray(pixels(64, 64, 3)), "JPEG")
    yield "truncated.png", good[: len(good) // 2]
    yield "truncated.jpg", jpeg[: len(jpeg) // 2]
    yield "empty.png", b""
    yield "text.png", b"this is not an image"
    yield "header.png", good[:20]
    yield "flipped.png", good[:60] + bytes(byte ^ 255 for byte in good[60:200]) + good[200:]
    yield "float.tif", encode(Image.new("F", (3, 2), 0.5), "TIFF")
    yield "deep.tif", encode(Image.new("I", (3, 2), 70000), "TIFF")


@pytest.mark.parametrize("name, data", [pytest.param(*d, id=d[0]) for d in damaged()])
def test_damaged_files_are_named(name, data):
    with pytest.raises(ValueError, match=name):
        decode_image(data, 3, name)


def test_bomb_missing_file_and_channels(tmp_path, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS is not None
    data = encode(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="bomb.png.*exceeds limit"):
        decode_image(data, 3, "bomb.png")
    with pytest.raises(ValueError, match="gone.png"):
        decode_image(tmp_path / "gone.png", 3, str(tmp_path / "gone.png"))
    with pytest.raises(ValueError, match="channels=2"):
        decode_image(data, 2, "x")


# Crops


def test_center_crop():
    image = Image.fromarray(pixels(5, 9, 3))
    assert np.array_equal(center_crop_arr(image, 5), np.asarray(image)[:, 2:7])
    assert np.array_equal(center_crop_arr(image, (5, 9)), np.asarray(image))
    checks = Image.fromarray(np.kron([[0, 200], [100, 255]], np.ones((8, 8))).astype(np.uint8))
    halved = center_crop_arr(checks, 4)  # two exact box halvings, no bicubic overshoot
    assert halved.tolist() == [[0, 0, 200, 200]] * 2 + [[100, 100, 255, 255]] * 2
    for mode in ("L", "RGB", "RGBA"):
        for size in ((3, 2), (64, 64), (7, 100), (131, 67)):
            for target in (1, 16, (8, 24), (24, 8), 33):
                shape = center_crop_arr(Image.new(mode, size, 0), target).shape
                wanted = target if isinstance(target, tuple) else (target, target)
                assert shape[:2] == wanted and shape[2:] == ((len(mode),) if mode != "L" else ())


def test_center_crop_of_a_gradient_is_centred():
    ramp = np.broadcast_to(np.linspace(0, 255, 300).astype(np.uint8), (100, 300))
    row = center_crop_arr(Image.fromarray(np.ascontiguousarray(ramp)), 20).astype(float).mean(0)
    assert abs(row.mean() - 127.5) < 1.5 and abs((row[-1] - row[0]) - 255 / 300 * 95) < 3


def test_random_crop_is_addressed():
    image = Image.fromarray(pixels(90, 120, 3))
    first = random_crop_arr(image, 32, uniforms=(0.8, 0.2, 0.3))
    assert first.shape == (32, 32, 3)
    assert np.array_equal(first, random_crop_arr(image, 32, uniforms=(0.8, 0.2, 0.3)))
    for other in ((0.1, 0.2, 0.3), (0.8, 0.9, 0.3), (0.8, 0.2, 0.9)):
        assert not np.array_equal(first, random_crop_arr(image, 32, uniforms=other))
    exact = random_crop_arr(image, 32, max_crop_frac=1, min_crop_frac=1, uniforms=(0, 0, 0.5))
    wide = np.asarray(
        image.resize((60, 45), Image.Resampling.BOX).resize(
            (round(60 * 32 / 45), 32), Image.Resampling.BICUBIC
        )
    )
    assert np.array_equal(exact, wide[:, 6:38])  # floor(0.5 * (43 - 32 + 1)) columns in
    top = 1 - 2**-24  # the largest uniform
    for size in (1, 8, 49, (16, 40), (40, 16)):
        for u in ((0, 0, 0), (top, top, top)):
            wanted = size if isinstance(size, tuple) else (size, size)
            assert random_crop_arr(image, size, uniforms=u).shape[:2] == wanted
    assert random_crop_arr(image, 32).shape == (32, 32, 3)
    for fractions in ((0, 1), (0.9, 0.8), (0.5, 1.5)):
        with pytest.raises(ValueError, match="crop fractions"):
            random_crop_arr(image, 32, *fractions)


def test_random_crop_covers_the_published_scales(monkeypatch):
    """The shorter side takes every whole value in [ceil(32 / 1), ceil(32 / .8)], and no other."""
    sides = set()
    cover = image_io._cover
    monkeypatch.setattr(image_io, "_cover", lambda image, *hw: sides.add(hw) or cover(image, *hw))
    for k in range(200):
        random_crop_arr(Image.new("L", (70, 50)), 32, uniforms=(k / 200, 0, 0))
    assert sides == {(side, side) for side in range(32, 41)}


@pytest.mark.parametrize("size", [0, (4, 0), (1, 2, 3)])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="image_size"):
        center_crop_arr(Image.new("L", (4, 4)), size)


# npz


def test_write_npz_is_numpys_format(tmp_path):
    arrays = {
        "arr_0": pixels(5, 4, 4, 3),
        "arr_1": np.arange(5),
        "mu": np.linspace(0, 1, 7),
        "n": np.array(3.5),
        "none": np.zeros((0, 2)),
    }
    write_npz(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert list(loaded) == list(arrays)
        for key, array in arrays.items():
            assert loaded[key].dtype == array.dtype and np.array_equal(loaded[key], array)
    first = (tmp_path / "a.npz").read_bytes()
    write_npz(tmp_path / "a.npz", arrays)
    assert (tmp_path / "a.npz").read_bytes() == first
    assert os.listdir(tmp_path) == ["a.npz"]
    with pytest.raises(ValueError, match="Python objects"):
        write_npz(tmp_path / "b.npz", {"x": np.array([None])})


def test_failed_write_leaves_the_old_file(tmp_path):
    write_npz(tmp_path / "a.npz", {"arr_0": pixels(2, 2)})
    before = (tmp_path / "a.npz").read_bytes()

    def chunks():
        yield pixels(1, 2, 2, 3)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"), NpzWriter(tmp_path / "a.npz") as out:
        out.write("arr_0", (2, 2, 2, 3), np.uint8, chunks())
    for shape, text in (((3, 2, 2, 3), "got 2 rows"), ((2, 2, 2, 1), "a chunk is")):
        with pytest.raises(ValueError, match=text), NpzWriter(tmp_path / "a.npz") as out:
            out.write("arr_0", shape, np.uint8, [pixels(2, 2, 2, 3)])
    assert (tmp_path / "a.npz").read_bytes() == before and os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize(
    "save", [write_npz, lambda p, a: np.savez(p, **a), lambda p, a: np.savez_compressed(p, **a)]
)
def test_reader_rows(tmp_path, save):
    images, labels = pixels(50, 4, 6, 3), np.arange(50)
    save(tmp_path / "a.npz", {"arr_0": images, "arr_1": labels})
    with NpzReader(tmp_path / "a.npz") as reader:
        assert reader.keys == ["arr_0", "arr_1"]
        assert reader.shape("arr_0") == images.shape and reader.dtype("arr_1") == np.int64
        for start, stop in ((0, 7), (7, 20), (49, 50), (3, 3), (2, 4), (0, 50)):  # also backwards
            assert np.array_equal(reader.rows("arr_0", start, stop), images[start:stop])
        assert np.array_equal(np.concatenate(list(reader.chunks("arr_1", 3))), labels[3:])
        mapped = reader.mapped("arr_0")
        assert mapped is None or np.array_equal(mapped, images)
        assert (mapped is None) == (
            zipfile.ZipFile(tmp_path / "a.npz").infolist()[0].compress_type != zipfile.ZIP_STORED
        )
        for bad in ((-1, 2), (0, 51), (3, 2)):
            with pytest.raises(ValueError, match="has no rows"):
                reader.rows("arr_0", *bad)
        with pytest.raises(ValueError, match=r"no array 'x'; it has \['arr_0', 'arr_1'\]"):
            reader.rows("x", 0, 1)
    assert np.array_equal(read_npz_rows(tmp_path / "a.npz", "arr_1", 48, 50), [48, 49])


def test_reader_refuses_what_it_cannot_read(tmp_path):
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}, {}]))
    with pytest.raises(ValueError, match="pickle.npz.*Python objects"):
        read_npz_rows(tmp_path / "pickle.npz", "arr_0", 0, 1)
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(pixels(3, 4)))
    with pytest.raises(ValueError, match="ascontiguousarray"):
        read_npz_rows(tmp_path / "fortran.npz", "arr_0", 0, 1)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "cut.npz", arr_0=pixels(1000, 8, 8))
        data = (tmp_path / "cut.npz").read_bytes()
        (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="cut.npz"):
            read_npz_rows(tmp_path / "cut.npz", "arr_0", 0, 1000)
    data = bytearray(data)
    data[len(data) // 2] ^= 255
    (tmp_path / "bit.npz").write_bytes(data)
    with pytest.raises(ValueError, match="bit.npz.*damaged"):
        read_npz_rows(tmp_path / "bit.npz", "arr_0", 0, 1000)
    with pytest.raises(ValueError, match="gone.npz"):
        NpzReader(tmp_path / "gone.npz")


def test_merge(tmp_path):
    images, labels = pixels(10, 4, 4, 3), np.arange(10)
    shards = [tmp_path / f"shard{k}.npz" for k in range(3)]
    for shard, rows in zip(shards, (slice(0, 4), slice(4, 5), slice(5, 10))):
        write_npz(shard, {"arr_0": images[rows], "arr_1": labels[rows]})
    for n in (10, 7, 4, 1):
        merge_npz(tmp_path / "all.npz", shards, n)
        with np.load(tmp_path / "all.npz", allow_pickle=False) as merged:
            assert np.array_equal(merged["arr_0"], images[:n])
            assert np.array_equal(merged["arr_1"], labels[:n])
    with pytest.raises(ValueError, match="11 rows wanted.*hold only 10"):
        merge_npz(tmp_path / "all.npz", shards, 11)
    write_npz(shards[1], {"arr_0": images[:1]})
    with pytest.raises(ValueError, match="shard1.npz has the arrays"):
        merge_npz(tmp_path / "all.npz", shards, 10)
    write_npz(shards[1], {"arr_0": pixels(1, 4, 4, 1), "arr_1": labels[:1]})
    with pytest.raises(
        ValueError, match=r"shard1.npz: arr_0 has rows uint8 \[4, 4, 1\], but uint8 \[4, 4, 3\] in"
    ):
        merge_npz(tmp_path / "all.npz", shards, 10)
    with pytest.raises(ValueError, match="no shards"):
        merge_npz(tmp_path / "all.npz", [], 0)
    assert sorted(os.listdir(tmp_path)) == ["all.npz", "shard0.npz", "shard1.npz", "shard2.npz"]


def test_memory_of_merge_is_flat(tmp_path):
    """200 MB of shards pass through a process whose peak memory grows by less than 64 MB."""
    shards = [str(tmp_path / f"{k}.npz") for k in range(2)]
    chunk = pixels(100, 512, 512, 1)
    for shard in shards:
        with NpzWriter(shard) as out:
            out.write("arr_0", (400, 512, 512, 1), np.uint8, [chunk] * 4)
    code = (
        "import resource, sys\n"
        "from guided_diffusion_ip.data.npz_io import merge_npz\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "merge_npz(sys.argv[1], sys.argv[2:], 800)\n"
        "print(peak() - before)"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "all.npz"), *shards],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    assert int(done.stdout) < 64 * 1024
    assert np.array_equal(read_npz_rows(tmp_path / "all.npz", "arr_0", 795, 800), chunk[-5:])


# PNG


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grid_holds_exactly_its_images(tmp_path, channels):
    images = pixels(5, 40, 33, channels)
    save_grid(images, tmp_path / "g.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "g.png")).reshape(2 * 42 + 2, 3 * 35 + 2, channels)
    seen = np.zeros(grid.shape[:2], dtype=bool)
    for k, image in enumerate(images):
        part = np.s_[2 + 42 * (k // 3) : 42 + 42 * (k // 3), 2 + 35 * (k % 3) : 35 + 35 * (k % 3)]
        assert np.array_equal(grid[part], image)
        seen[part] = True
    assert (grid[~seen][..., : min(channels, 3)] == 128).all()


def test_grid_enlarges_small_images_and_counts_columns(tmp_path):
    images = torch.from_numpy(pixels(7, 16, 16, 3))
    save_grid(images, tmp_path / "g.png")
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (3 * 66 + 2, 3 * 66 + 2, 3)
    assert np.array_equal(grid[2:66:4, 68:132:4], images[1])
    assert (grid[2:6, 68:72] == grid[2, 68]).all()
    save_grid(images[:1], tmp_path / "one.png", columns=9)
    with Image.open(tmp_path / "one.png") as single:
        assert single.size == (68, 68)


def test_grid_captions(tmp_path):
    images = np.zeros((2, 40, 40, 1), dtype=np.uint8)
    save_grid(images, tmp_path / "g.png", captions=["7", "a very long caption indeed"])
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (56, 86)
    assert (grid[42:54, 2:42] > 200).any() and (grid[2:42, 2:42] == 0).all()
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        save_grid(images, tmp_path / "g.png", captions=["7"])
    for bad in (images[:0], images[0], images.astype(float)):
        with pytest.raises(ValueError, match="a grid needs"):
            save_grid(bad, tmp_path / "g.png")
    with pytest.raises(ValueError, match="columns=0"):
        save_grid(images, tmp_path / "g.png", columns=0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_round_trip(tmp_path, channels):
    image = pixels(7, 5, channels)
    save_png(image, tmp_path / "deep" / "a.png")
    got = decode_image(tmp_path / "deep" / "a.png", channels, "a.png")
    assert np.array_equal(np.asarray(got).reshape(image.shape), image)
    with pytest.raises(ValueError, match="uint8"):
        save_png(image.astype(np.float32), tmp_path / "a.png")
