"""image_datasets.py, sources.py, batches.py, dataset_prep.py and datasets/digits.py."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from guided_diffusion_ip.data.image_datasets import ImageDataset, load_data
from guided_diffusion_ip.data.image_io import random_crop_arr, to_model_range
from guided_diffusion_ip.noise import Stream, uniform
from guided_diffusion_ip.preparation.writers import (
    count_images,
    write_image_folder,
    write_image_npz,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N, SIZE = 23, 8


def coded(n=N, height=SIZE, width=SIZE, channels=3):
    """Images that tell their number: pixel [0, 0] is it, the rest is noise; no symmetric ones."""
    images = np.random.default_rng(1).integers(0, 256, (n, height, width, channels), np.uint8)
    images[:, :, 0] = np.arange(n, dtype=np.uint8)[:, None, None]
    return images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 PNGs in sub-folders bee and ant; sorted by name they are not sorted by number."""
    root = tmp_path_factory.mktemp("images")
    for k, image in enumerate(coded()):
        place = root / "sub" / ("bee" if k % 3 else "ant")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{k:03d}.{'png' if k % 2 else 'PNG'}")
    (root / "notes.txt").write_text("not an image")
    (root / "sub" / "._000.png").write_bytes(b"macOS was here")
    return root


def order_of(root):
    """Numbers of the images in sorted order of their names."""
    names = sorted(str(p.relative_to(root)) for p in root.rglob("[0-9]*.*"))
    return [int(os.path.basename(name)[:3]) for name in names]


def numbers(batch):
    """Which images a batch without flips holds (see `coded`)."""
    return ((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def stream(data_dir, batch_size=4, image_size=SIZE, random_flip=False, **options):
    return load_data(
        data_dir=data_dir,
        batch_size=batch_size,
        image_size=image_size,
        random_flip=random_flip,
        **options,
    )


def take(images, count):
    """The first batches, pixels and labels, each concatenated."""
    batches = [next(images) for _ in range(count)]
    labels = [cond["y"] for _, cond in batches if cond]
    return torch.cat([x for x, _ in batches]), torch.cat(labels) if labels else None


# Order


def test_batch_form_and_deterministic_order(folder):
    images = stream(folder, deterministic=True, class_cond=True)
    batch, cond = next(images)
    assert batch.shape == (4, 3, SIZE, SIZE) and batch.dtype == torch.float32
    assert cond["y"].dtype == torch.int64 and cond["y"].shape == (4,)
    assert images.num_images == N and images.value_range == (-1.0, 1.0) and images.step == 1
    images.seek(0)
    x, y = take(images, 12)
    order = order_of(folder)
    assert numbers(x) == [order[p % N] for p in range(48)]
    assert torch.equal(x, to_model_range(coded()[numbers(x)]))
    assert images.classes == ["ant", "bee"]
    assert y.tolist() == [0 if k % 3 == 0 else 1 for k in numbers(x)]
    assert next(stream(folder))[1] == {}


def test_each_epoch_is_a_permutation(folder):
    x, _ = take(stream(folder, batch_size=5), 23)
    epochs = [numbers(x)[e * N : (e + 1) * N] for e in range(5)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert numbers(take(stream(folder, seed=1), 3)[0]) != numbers(take(stream(folder), 3)[0])


def test_order_does_not_depend_on_the_batch_size(folder):
    threes, _ = take(stream(folder, batch_size=3), 15)
    fives, _ = take(stream(folder, batch_size=5), 9)
    assert torch.equal(threes, fives)


@pytest.mark.parametrize(
    "options",
    [
        dict(random_flip=True),
        dict(random_crop=True, num_workers=0),
        dict(random_flip=True, random_crop=True, num_workers=0),
    ],
)
def test_two_ranks_make_one_stream(folder, options):
    one = stream(folder, batch_size=6, class_cond=True, **options)
    two = [
        stream(folder, batch_size=3, class_cond=True, rank=rank, world=2, **options)
        for rank in (0, 1)
    ]
    for _ in range(9):
        (x, c), parts = next(one), [next(part) for part in two]
        assert torch.equal(x, torch.cat([part for part, _ in parts]))
        assert torch.equal(c["y"], torch.cat([cond["y"] for _, cond in parts]))


def test_fewer_images_than_the_batch(tmp_path):
    write_image_folder(tmp_path / "three", ((image, None) for image in coded(3)))
    ranks = [stream(tmp_path / "three", batch_size=8, rank=rank, world=2) for rank in (0, 1)]
    seen = []
    for _ in range(6):
        seen += [k for part in ranks for k in numbers(next(part)[0])]
    epochs = [seen[p : p + 3] for p in range(0, 96, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert numbers(next(stream(tmp_path / "three", batch_size=8, deterministic=True))[0]) == [
        0,
        1,
        2,
        0,
        1,
        2,
        0,
        1,
    ]


def test_seek_and_start_step(folder):
    images = stream(folder, random_flip=True)
    batches = [next(images)[0] for _ in range(12)]
    for step in (7, 0, 11, 3):
        images.seek(step)
        assert images.step == step and torch.equal(next(images)[0], batches[step])
    late = stream(folder, random_flip=True, start_step=9)
    assert late.step == 9 and torch.equal(next(late)[0], batches[9]) and late.step == 10
    far = stream(folder, start_step=2**32 - 1)
    assert next(far)[0].shape[0] == 4
    for bad in (-1, 2**32):
        with pytest.raises(ValueError, match="step="):
            images.seek(bad)


# Flip and crop


def test_flips(folder):
    plain, _ = take(stream(folder, batch_size=32), 40)
    flipped, _ = take(stream(folder, batch_size=32, random_flip=True), 40)
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(-1) == flipped).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(mirrored.double().mean() - 0.5) < 4 * 0.5 / len(mirrored) ** 0.5
    by_step = mirrored.reshape(40, 32).double()
    assert stats.chisquare(by_step.sum(0)).pvalue > 1e-3 and len(by_step.unique(dim=0)) == 40


def test_random_crop_changes_with_step_and_place_only(tmp_path):
    image = coded(1, 100, 150)[0]
    write_image_folder(tmp_path / "one", [(image, None)])
    options = dict(random_crop=True, num_workers=0, image_size=40)
    x, _ = take(stream(tmp_path / "one", **options), 3)
    assert len(x.unique(dim=0)) >= 10  # two of 12 pieces may coincide
    assert torch.equal(x, take(stream(tmp_path / "one", **options), 3)[0])
    assert not torch.equal(x, take(stream(tmp_path / "one", seed=5, **options), 3)[0])
    crop = uniform(0, Stream.CROP, [3], 2, (3,))[0].tolist()  # position 3 of step 2
    wanted = random_crop_arr(Image.fromarray(image), 40, uniforms=crop)
    assert torch.equal(x[11:], to_model_range(wanted[None]))


def test_sizes_and_channels(tmp_path):
    write_image_folder(tmp_path / "odd", [(coded(1, 40, 60)[0], None), (coded(1, 9, 7)[0], None)])
    for size in (16, (24, 12), (12, 24)):
        for channels in (1, 3, 4):
            for crop in (False, True):
                x, _ = next(
                    stream(
                        tmp_path / "odd",
                        image_size=size,
                        channels=channels,
                        random_crop=crop,
                        num_workers=0,
                    )
                )
                assert x.shape == (4, channels, *(size if isinstance(size, tuple) else (16, 16)))
                assert channels < 4 or (x[:, 3] == 1).all()


# Workers, memory, in-process


@pytest.mark.parametrize(
    "options", [dict(random_flip=True, class_cond=True), dict(random_flip=True, random_crop=True)]
)
def test_workers_equal_in_process_equal_memory(folder, options):
    before = torch.random.get_rng_state()
    streams = [
        stream(folder, num_workers=2, cache_mb=0, **options),
        stream(folder, num_workers=0, cache_mb=0, **options),
        stream(folder, **options),
    ]
    streams[2:] = [] if "random_crop" in options else streams[2:]
    for step in (None, 5):
        if step is not None:
            for images in streams:
                images.seek(step)
        results = [take(images, 7) for images in streams]
        for x, y in results[1:]:
            assert torch.equal(x, results[0][0])
            assert y is None or torch.equal(y, results[0][1])
    workers = streams[0]._batches._workers
    for images in streams:
        images.close()
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was used"


def test_log_says_what_happens(folder):
    lines = []
    stream(folder, class_cond=True, log=lines.append)
    stream(folder, cache_mb=0, num_workers=2, log=lines.append)
    stream(folder, cache_mb=0, num_workers=0, log=lines.append)
    for line, parts in zip(
        lines,
        (
            ["23 images", "2 classes from sub-folder names (ant, bee)", "kept in memory", "8 x 8"],
            ["2 worker processes"],
            ["this process"],
        ),
    ):
        assert str(folder) in line and all(part in line for part in parts)


def test_worker_count_shares_the_node(monkeypatch):
    from guided_diffusion_ip.data import image_datasets

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12), raising=False)
    for name in (
        "LOCAL_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
        "SLURM_NTASKS_PER_NODE",
    ):
        monkeypatch.delenv(name, raising=False)
    assert [image_datasets._cores_per_process(world) for world in (1, 4, 64)] == [8, 3, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert image_datasets._cores_per_process(64) == 6


def test_a_broken_image_is_named(folder, tmp_path):
    write_image_folder(tmp_path / "set", ((image, None) for image in coded()))
    good = (tmp_path / "set" / "0007.png").read_bytes()
    (tmp_path / "set" / "0007.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="0007.png cannot be read as an image"):
        stream(tmp_path / "set")
    for workers in (0, 2):
        images = stream(tmp_path / "set", cache_mb=0, num_workers=workers)
        with pytest.raises(ValueError, match="^[^\n]*0007.png cannot be read[^\n]*$") as caught:
            take(images, 6)
        assert "Traceback" not in str(caught.value)
        images.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_workers_end_with_their_process_and_survive_signals(folder):
    """A SIGTERM to the whole group must leave the workers to the trainer, and no exit may hang."""
    code = (
        "import os, signal, sys, time\n"
        "from guided_diffusion_ip.data.image_datasets import load_data\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "s = load_data(data_dir=sys.argv[1], batch_size=4, image_size=8, cache_mb=0,"
        " num_workers=2)\n"
        "next(s)\n"
        "os.killpg(0, signal.SIGTERM)\n"
        "for _ in range(30): next(s)\n"
        "print(os.getpid(), *(w.pid for w in s._batches._workers))"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 12
    for pid in done.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), signal.SIG_DFL)


# Sources


def test_zip_and_npz_equal_the_folder(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.rglob("*"), reverse=True):
            packed.write(path, path.relative_to(folder))
    order = order_of(folder)
    labels = [0 if k % 3 == 0 else 1 for k in order]
    np.savez(tmp_path / "a.npz", arr_0=coded()[order], arr_1=np.array(labels, dtype=np.uint8))
    np.savez_compressed(tmp_path / "b.npz", arr_0=coded()[order], arr_1=labels)
    for options in (
        dict(),
        dict(cache_mb=0, num_workers=2),
        dict(random_crop=True, num_workers=2),
        dict(image_size=5),
        dict(channels=1),
    ):
        wanted = take(stream(folder, class_cond=True, random_flip=True, **options), 6)
        for name in ("a.zip", "a.npz", "b.npz"):
            images = stream(tmp_path / name, class_cond=True, random_flip=True, **options)
            got = take(images, 6)
            assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
            images.close()
            assert next(images)[0].shape[0] == 4  # closing is not the end
            images.close()


def test_npz_of_the_right_shape_is_not_copied(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=coded())
    images = stream(tmp_path / "a.npz", cache_mb=0)
    assert isinstance(images._maker.memory.base, np.memmap)
    before = coded()
    take(stream(tmp_path / "a.npz", random_flip=True), 10)
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], before)


@pytest.mark.parametrize(
    "arrays, text",
    [
        (dict(x_train=coded()), r"has the arrays \['x_train'\], but needs arr_0"),
        (dict(arr_0=coded().astype(np.float32)), r"float32 .* must be uint8"),
        (dict(arr_0=coded(height=9).transpose(0, 3, 1, 2).copy()), r"looks like \[N, C, H, W\]"),
        (dict(arr_0=coded()[..., 0]), r"needs a channel axis"),
        (dict(arr_0=coded()[..., :2].copy()), r"C of 1 or 3 or 4"),
        (dict(arr_0=coded()[:0]), r"N >= 1"),
        (dict(arr_0=coded()), r"has no labels"),
        (dict(arr_0=coded(), arr_1=np.arange(5)), r"integers \[23\]"),
        (dict(arr_0=coded(), arr_1=np.zeros(N)), r"integers \[23\]"),
        (dict(arr_0=coded(), arr_1=np.arange(N) - 1), r"label -1"),
    ],
)
def test_npz_errors(tmp_path, arrays, text):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"bad.npz.*{text}"):
        stream(tmp_path / "bad.npz", class_cond=True)


def test_data_dir_errors(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tape.tar").write_bytes(b"x")
    (tmp_path / "fake.zip").write_bytes(b"x")
    np.savez(tmp_path / "empty" / "inside.npz", arr_0=coded())
    for name, text in (
        ("gone", "does not exist"),
        ("tape.tar", "another kind"),
        ("fake.zip", "cannot be read as a zip"),
        ("empty", "holds no images .did you mean .*inside.npz"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{text}"):
            stream(tmp_path / name)
    for options, text in (
        (dict(batch_size=0), "batch_size=0"),
        (dict(rank=2, world=2), "rank=2"),
        (dict(channels=2), "channels=2"),
        (dict(image_size=0), "image_size=0"),
        (dict(num_workers=-1), "num_workers=-1"),
        (dict(data_dir=""), "no data"),
    ):
        with pytest.raises(ValueError, match=text):
            stream(**(dict(data_dir=folder) | options))


def test_remote_folder(folder, monkeypatch):
    """blobfile is imported only for remote paths; here a stand-in that serves the local folder."""
    fake = types.SimpleNamespace(
        Error=ValueError,
        walk=lambda top: (
            (f"gs://bucket/{os.path.relpath(where, folder)}/".replace("/./", "/"), [], files)
            for where, _, files in os.walk(folder)
        ),
        BlobFile=lambda path, mode: open(str(path).replace("gs://bucket", str(folder)), mode),
    )
    monkeypatch.setitem(sys.modules, "blobfile", fake)
    got = take(stream("gs://bucket", class_cond=True), 6)
    wanted = take(stream(folder, class_cond=True), 6)
    assert all(torch.equal(*pair) for pair in zip(got, wanted))
    monkeypatch.setitem(sys.modules, "blobfile", None)
    with pytest.raises(ValueError, match="pip install blobfile"):
        stream("az://account/container")


# Classes


@pytest.mark.parametrize(
    "names, classes, labels, rule",
    [
        (["b_1", "a_1", "b_2"], ["a", "b"], [0, 1, 1], "prefixes"),
        (["x/b_1", "y/a_1", "y/b_2"], ["a", "b"], [1, 0, 1], "prefixes"),
        (["b/1", "a/1", "b/2"], ["a", "b"], [0, 1, 1], "sub-folder"),
        (["deep/b/1_1", "deep/a/1", "b/2_2"], ["a", "b"], [1, 0, 1], "sub-folder"),
        (["cat/img_1", "dog/img_2"], ["cat", "dog"], [0, 1], "sub-folder"),
        (["x/img_1", "x/img_2"], ["img"], [0, 0], "prefixes"),
    ],
)
def test_class_rules(tmp_path, names, classes, labels, rule):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    lines = []
    images = stream(tmp_path, len(names), class_cond=True, deterministic=True, log=lines.append)
    assert images.classes == classes and next(images)[1]["y"].tolist() == labels
    assert rule in lines[0]


@pytest.mark.parametrize("names", [["1", "2"], ["a/1", "2"], ["all/1", "all/2"]])
def test_no_classes(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="no classes found.*cat_001.png"):
        stream(tmp_path, class_cond=True)
    assert stream(tmp_path).classes is None


def test_more_classes_than_the_model(folder):
    with pytest.raises(ValueError, match="2 classes, but the model has 1: pass --num_classes 2"):
        stream(folder, class_cond=True, num_classes=1)
    assert stream(folder, class_cond=True, num_classes=1000).classes == ["ant", "bee"]


# ImageDataset, dataset_prep, digits


def test_image_dataset(folder):
    paths = sorted(str(path) for path in folder.rglob("[0-9]*.*"))
    labels = [int("bee" in path) for path in paths]
    data = ImageDataset(SIZE, paths, classes=labels, random_flip=False)
    x, y = take(stream(folder, batch_size=N, deterministic=True, class_cond=True), 1)
    assert len(data) == N and data[3][0].dtype == np.float32 and data[3][1]["y"].dtype == np.int64
    for i in range(N):
        assert np.array_equal(data[i][0], x[i]) and data[i][1]["y"] == y[i]
    shards = [ImageDataset(SIZE, paths, shard=k, num_shards=3, random_flip=False) for k in range(3)]
    assert [len(shard) for shard in shards] == [8, 8, 7] and shards[0][0][1] == {}
    assert np.array_equal(shards[1][2][0], data[7][0])
    random.seed(0)
    flipping, cropping = ImageDataset(SIZE, paths), ImageDataset(4, paths, random_crop=True)
    kinds = {np.array_equal(flipping[0][0], data[0][0]) for _ in range(20)}
    assert kinds == {True, False} and cropping[0][0].shape == (3, 4, 4)
    loader = torch.utils.data.DataLoader(data, batch_size=5, drop_last=True)
    assert next(iter(loader))[0].shape == (5, 3, SIZE, SIZE)
    assert len(pickle.loads(pickle.dumps(data))) == N
    with pytest.raises(ValueError, match="shard=3"):
        ImageDataset(SIZE, paths, shard=3, num_shards=3)
    with pytest.raises(ValueError, match="2 classes for 23"):
        ImageDataset(SIZE, paths, classes=[0, 1])


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_batch_makers_travel_to_spawned_workers(folder, tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for path in folder.rglob("*.p*"):
            packed.write(path, path.relative_to(folder))
    np.savez(tmp_path / "a.npz", arr_0=coded(200, 64, 64))
    where = {"folder": folder, "zip": tmp_path / "a.zip", "npz": tmp_path / "a.npz"}[kind]
    maker = stream(where, cache_mb=0, num_workers=1)._maker
    data = pickle.dumps(maker)
    assert len(data) < 20_000, "pixels or open files went along"
    assert torch.equal(pickle.loads(data).batch(3)[0], maker.batch(3)[0])


def test_dataset_prep(tmp_path):
    items = [(image, "ab"[k % 2]) for k, image in enumerate(coded(5))]
    assert write_image_folder(tmp_path / "set", items) == count_images(tmp_path / "set") == 5
    assert np.array_equal(Image.open(tmp_path / "set" / "b" / "0003.png"), items[3][0])
    with pytest.raises(ValueError, match="not empty"):
        write_image_folder(tmp_path / "set", items)
    for bad, text in (
        ([], "no images"),
        ([(items[0][0], "a/b")], "class name"),
        ([(items[0][0], "..")], "class name"),
    ):
        with pytest.raises(ValueError, match=text):
            write_image_folder(tmp_path / "other", items + bad if bad else bad)
    assert os.listdir(tmp_path) == ["set"] and count_images(tmp_path / "other") == 0
    write_image_npz(tmp_path / "a.npz", iter(coded(5)), (5, SIZE, SIZE, 3), labels=range(5))
    x, y = take(stream(tmp_path / "a.npz", 5, deterministic=True, class_cond=True), 1)
    assert numbers(x) == y.tolist() == list(range(5))
    with pytest.raises(ValueError, match="3 labels for 5"):
        write_image_npz(tmp_path / "b.npz", iter(coded(5)), (5, SIZE, SIZE, 3), labels=range(3))


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    command = [
        sys.executable,
        os.path.join(ROOT, "datasets", "digits.py"),
        "--out",
        str(tmp_path / "digits"),
    ]
    environment = os.environ | {"PYTHONPATH": ROOT}
    say = [
        subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        for _ in range(2)
    ]
    assert "wrote 1797" in say[0] and "already there" in say[1]
    assert all(text.count("\n") == 1 for text in say)
    images = stream(tmp_path / "digits", 1797, 16, channels=1, class_cond=True, deterministic=True)
    x, cond = next(images)
    assert images.classes == list("0123456789") and x.min() == -1 and x.max() == 1
    data = load_digits()
    assert torch.equal(cond["y"], torch.from_numpy(np.sort(data.target)))
    small = torch.nn.functional.avg_pool2d(x, 2).flatten(1).numpy()
    truth = data.images[np.argsort(data.target, kind="stable")].reshape(1797, 64)
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(small, truth)) > 0.95
    (tmp_path / "digits" / "0" / "0000.png").unlink()
    refused = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and "not empty" in refused.stderr
    assert "Traceback" not in refused.stderr
