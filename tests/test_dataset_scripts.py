"""The scripts in datasets/: what all have in common, and those that read batches (CIFAR-10,
ImageNet), on small sources.
"""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from dataset_tools import (
    PARTIAL,
    ROOT,
    arrays,
    contents,
    into_folder,
    into_tar,
    into_zip,
    run,
    script,
)
from PIL import Image

from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.data.image_set import open_image_set
from guided_diffusion_ip.data.preprocessing import recorded

SCRIPTS = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "imagenet32": "https://image-net.org/",
    "lsun_tower": "https://www.yf.io/p/lsun",
    "celeba64": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "ffhq128": "https://github.com/NVlabs/ffhq-dataset",
}


# All scripts


def test_missing_source_names_the_page_and_exits_with_2(tmp_path):
    """As real scripts; all in one process, because importing torch takes longest."""
    code = (
        "import runpy, sys\n"
        "for words in open(sys.argv[1]).read().splitlines():\n"
        "    sys.argv = words.split('|')\n"
        "    try:\n"
        "        runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print(end.code, file=sys.stderr)\n"
    )
    lines = [
        f"{ROOT}/datasets/{name}.py|--out|{tmp_path}/out{given}"
        for name in SCRIPTS
        for given in ("", f"|--source|{tmp_path}/gone")
    ]
    (tmp_path / "list").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "list")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    said = done.stderr.splitlines()
    assert len(said) == 2 * len(lines) and said[1::2] == ["2"] * len(lines), done.stderr
    for k, (name, page) in enumerate(SCRIPTS.items()):
        none, gone = said[4 * k], said[4 * k + 2]
        expected = script(name).SET.files
        assert none.startswith("error: no --source given: ") and gone.startswith(
            f"error: {tmp_path}/gone does not exist: "
        )
        for line in (none, gone):
            assert page in line and all(file in line for file in expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, text",
    [
        ("cifar10", "holds no data_batch_1.bin or data_batch_1: download"),
        ("imagenet32", "holds no train_data_batch_1 or"),
        ("lsun_tower", "is no LMDB folder"),
        ("celeba64", "holds no images: download"),
        ("ffhq128", "holds no images: download"),
    ],
)
def test_a_source_with_something_else(tmp_path, name, text):
    into_folder(tmp_path / "s", {"notes.txt": b"x"})
    with pytest.raises(ValueError, match=f"{text}.*{SCRIPTS[name]}"):
        run(name, "--source", tmp_path / "s", "--out", tmp_path / "out")
    (tmp_path / "s.tar.gz").write_bytes(b"\x1f\x8b\x08 not really")
    with pytest.raises(
        ValueError, match=r"s\.tar\.gz (cannot be read|is a file of another kind|is no LMDB)"
    ):
        run(name, "--source", tmp_path / "s.tar.gz", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# CIFAR-10


def cifar(per_batch=4):
    """Planes uint8 [n, 3072] and labels of the 5 + 1 batches, by name."""
    numbers = np.random.default_rng(0)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    return {
        name: (
            numbers.integers(0, 256, (per_batch, 3072), np.uint8),
            numbers.integers(0, 10, per_batch),
        )
        for name in names
    }


def cifar_pickles(protocol=2):
    files = {
        f"cifar-10-batches-py/{name}": pickle.dumps(
            {
                b"batch_label": b"one",
                b"labels": labels.tolist(),
                b"data": data,
                b"filenames": [b"a.png"] * len(data),
            },
            protocol,
        )
        for name, (data, labels) in reversed(cifar().items())
    }  # the published archive is not in order either
    return files | {
        "cifar-10-batches-py/batches.meta": pickle.dumps({b"label_names": [b"cat"]}, protocol)
    }


def cifar_binaries():
    return {
        f"cifar-10-batches-bin/{name}.bin": np.c_[labels.astype(np.uint8), data].tobytes()
        for name, (data, labels) in cifar().items()
    }


@pytest.mark.parametrize(
    "form",
    ["binary tar", "binary folder", "pickle tar", "pickle folder", "both, in the folder above"],
)
def test_cifar10(tmp_path, form, capsys):
    source = tmp_path / "cifar-10-batches"
    files = cifar_binaries() if "binary" in form else cifar_pickles()
    (into_tar if "tar" in form else into_folder)(source, files)
    if "both" in form:
        source = tmp_path / "downloads"
        source.mkdir()
        into_tar(source / "cifar-10-binary.tar.gz", cifar_binaries())
        (source / "cifar-10-python.tar.gz").write_bytes(b"not looked at")
    out = tmp_path / "out"
    run("cifar10", "--source", source, "--out", out, PARTIAL)
    assert "found 20 images, published are 50,000" in capsys.readouterr().out
    data, labels = (np.concatenate(part) for part in zip(*list(cifar().values())[:5]))
    reference = arrays(out / "reference.npz")
    assert reference["arr_0"].shape == (20, 32, 32, 3) and reference["arr_0"].dtype == np.uint8
    assert np.array_equal(reference["arr_0"].transpose(0, 3, 1, 2).reshape(20, -1), data)
    assert recorded(out / "train") == recorded(out / "reference.npz") == "cifar10 32x32x3"
    names = sorted(str(path.relative_to(out / "train")) for path in (out / "train").rglob("*.png"))
    classes = script("cifar10").CLASSES
    assert names == sorted(f"{classes[label]}/{k:05d}.png" for k, label in enumerate(labels))
    for name in names:
        assert np.array_equal(
            Image.open(out / "train" / name), reference["arr_0"][int(name[-9:-4])]
        )
    stream = load_data(data_dir=out / "train", batch_size=20, image_size=32, class_cond=True)
    assert (
        stream.classes == sorted(set(classes[k] for k in labels))
        and stream.preprocessing == "cifar10 32x32x3"
    )
    packed = load_data(data_dir=out / "train.npz", batch_size=20, image_size=32, class_cond=True)
    (x, cond), (y, packed_cond) = next(stream), next(packed)
    assert (x == y).all() and (cond["y"] == packed_cond["y"]).all()
    assert (packed.classes, packed.preprocessing) == (stream.classes, stream.preprocessing)
    before = contents(out)
    run("cifar10", "--source", source, "--out", out, PARTIAL)
    run("cifar10", "--source", source, "--out", out, PARTIAL, "--split", "test")
    assert {
        name: data for name, data in contents(out).items() if not name.startswith("test/")
    } == before
    test = open_image_set(out / "test", (32, 32), 3, num_classes=10)
    assert len(test) == 4 and test.preprocessing == "cifar10-test 32x32x3"
    assert sorted(os.listdir(out)) == ["reference.npz", "test", "train", "train.npz"]


def test_cifar10_that_is_not_whole(tmp_path):
    files = cifar_binaries()
    files.pop("cifar-10-batches-bin/data_batch_3.bin")
    into_folder(tmp_path / "s", files)
    for argv, count in (
        ((), "16 images, published are 50,000"),
        (("--split", "test"), "4 images, published are 10,000"),
    ):
        with pytest.raises(
            ValueError, match=f"found {count}: the download is not complete.*--allow_partial"
        ):
            run("cifar10", "--source", tmp_path / "s", "--out", tmp_path / "out", *argv)
    into_folder(tmp_path / "s", {"cifar-10-batches-bin/data_batch_1.bin": b"x" * 3072})
    with pytest.raises(ValueError, match="data_batch_1.bin has 3072 bytes"):
        run("cifar10", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL)
    into_folder(tmp_path / "s", {"cifar-10-batches-bin/data_batch_1.bin": b"\x0a" * 3073})
    with pytest.raises(ValueError, match="a label is 10"):
        run("cifar10", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL)
    assert not (tmp_path / "out").exists()


class Touch:
    """Unpickled by the pickle module, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["labels", "data", "batch"])
def test_a_malicious_cifar_archive_is_refused(tmp_path, place):
    mark = tmp_path / "was_run"
    bad = {
        "labels": {b"data": np.zeros((1, 3072), np.uint8), b"labels": Touch(mark)},
        "data": {b"data": Touch(mark)},
        "batch": Touch(mark),
    }[place]
    into_tar(
        tmp_path / "a.tar.gz",
        cifar_pickles() | {"cifar-10-batches-py/data_batch_2": pickle.dumps(bad)},
    )
    with pytest.raises(
        ValueError, match=r"a\.tar\.gz: data_batch_2: refused, .* \w+\.system, which could run code"
    ):
        run("cifar10", "--source", tmp_path / "a.tar.gz", "--out", tmp_path / "out", PARTIAL)
    assert not mark.exists() and not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists(), "the pickle of this test is harmless, so the test shows nothing"


@pytest.mark.parametrize("pack, ending", [(into_tar, ".tar.gz"), (into_folder, "")])
def test_damage_in_cifar(tmp_path, pack, ending):
    files = cifar_pickles()
    name = "cifar-10-batches-py/data_batch_4"
    pack(tmp_path / f"a{ending}", files | {name: files[name][:9000]})
    with pytest.raises(ValueError, match="data_batch_4 is damaged"):
        run("cifar10", "--source", tmp_path / f"a{ending}", "--out", tmp_path / "out", PARTIAL)
    if ending:
        data = (tmp_path / "a.tar.gz").read_bytes()
        (tmp_path / "a.tar.gz").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=r"a\.tar\.gz"):
            run("cifar10", "--source", tmp_path / "a.tar.gz", "--out", tmp_path / "out", PARTIAL)


# ImageNet 32


def imagenet(per_batch=3):
    numbers = np.random.default_rng(0)
    return {
        f"train_data_batch_{k}": {
            "data": numbers.integers(0, 256, (per_batch, 3072), np.uint8),
            "labels": numbers.integers(1, 1001, per_batch).tolist(),
            "mean": np.zeros(3072),
        }
        for k in range(1, 11)
    }


def imagenet_npz():
    files = {}
    for name, batch in imagenet().items():
        data = io.BytesIO()
        np.savez(data, **batch)
        files[f"{name}.npz"] = data.getvalue()
    return files


@pytest.mark.parametrize("form", ["npz zip", "npz folder", "pickle zip", "pickle folder"])
def test_imagenet32(tmp_path, form):
    files = (
        imagenet_npz()
        if "npz" in form
        else {name: pickle.dumps(batch) for name, batch in imagenet().items()}
    )
    (into_zip if "zip" in form else into_folder)(tmp_path / "s", files)
    out = tmp_path / "out"
    run("imagenet32", "--source", tmp_path / "s", "--out", out, PARTIAL)
    made = arrays(out / "train.npz")
    data = np.concatenate([batch["data"] for batch in imagenet().values()])
    assert made["arr_0"].shape == (30, 32, 32, 3)
    assert np.array_equal(made["arr_0"].transpose(0, 3, 1, 2).reshape(30, -1), data)
    assert made["arr_1"].tolist() == [
        label - 1 for batch in imagenet().values() for label in batch["labels"]
    ]
    assert made["arr_1"].dtype == np.int64 and str(made["preprocessing"]) == "imagenet32 32x32x3"
    assert os.path.samefile(out / "train.npz", out / "reference.npz")
    assert sorted(os.listdir(out)) == ["reference.npz", "train.npz"]
    run("imagenet32", "--out", out, PARTIAL)  # finished: the source may be gone


def test_imagenet32_is_whole_or_not_there(tmp_path):
    files = {name: pickle.dumps(batch) for name, batch in imagenet().items()}
    into_folder(tmp_path / "s", files | {"train_data_batch_7": files["train_data_batch_7"][:5000]})
    with pytest.raises(ValueError, match="train_data_batch_7 is damaged"):
        run("imagenet32", "--source", tmp_path / "s", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    into_folder(tmp_path / "s", files)
    with pytest.raises(ValueError, match="found 30 images, published are 1,281,167"):
        run("imagenet32", "--source", tmp_path / "s", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run("imagenet32", "--source", tmp_path / "s", "--out", tmp_path / "out", PARTIAL)
    assert sorted(os.listdir(tmp_path / "out")) == ["reference.npz", "train.npz"]


def test_imagenet32_errors(tmp_path):
    files = {name: pickle.dumps(batch) for name, batch in imagenet().items()}
    last = files.pop("train_data_batch_10")
    into_folder(tmp_path / "s", files)
    with pytest.raises(ValueError, match="holds 9 of 10 batches"):
        run("imagenet32", "--source", tmp_path / "s", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    data = np.zeros((2, 3072), np.uint8)
    bad = io.BytesIO()
    np.savez(bad, data=np.array([{}, {}]), labels=[1, 2])
    for content, text in (
        (pickle.dumps({"data": data, "labels": [0, 1]}), "no 'labels' from 1 to 1000"),
        (pickle.dumps({"data": data, "labels": [1]}), "one for each of its 2"),
        (
            pickle.dumps({"data": data[:, :768], "labels": [1, 2]}),
            r"no 'data' of uint8 \[n, 3072\]",
        ),
        (pickle.dumps(Touch(tmp_path / "was_run")), "refused"),
    ):
        into_folder(
            tmp_path / "t", files | {"train_data_batch_10": last, "train_data_batch_1": content}
        )
        with pytest.raises(ValueError, match=f"train_data_batch_1[: ].*{text}"):
            run("imagenet32", "--source", tmp_path / "t", "--out", tmp_path / "out")
    into_folder(tmp_path / "u", imagenet_npz() | {"train_data_batch_1.npz": bad.getvalue()})
    with pytest.raises(ValueError, match="train_data_batch_1.npz cannot be read: Object arrays"):
        run("imagenet32", "--source", tmp_path / "u", "--out", tmp_path / "out2")
    assert not (tmp_path / "was_run").exists()
