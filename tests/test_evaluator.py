"""evaluations/evaluator.py and make_reference.py as programs on files, and the parts around the
numbers.
"""

import json
import re
import sys
import zipfile
from pathlib import Path

import launch
import numpy as np
import pytest
import yaml
from PIL import Image

from guided_diffusion_ip.data.image_io import center_crop_arr
from guided_diffusion_ip.data.image_set import open_images
from guided_diffusion_ip.evaluation.evaluate import parse_metrics
from guided_diffusion_ip.evaluation.published import published_values
from guided_diffusion_ip.metrics import frechet_distance, precision_recall

ROOT = Path(__file__).resolve().parent.parent
EVALUATOR, MAKE, NPZ_TO_PNG = (
    str(ROOT / path)
    for path in (
        "evaluations/evaluator.py",
        "evaluations/make_reference.py",
        "scripts/npz_to_png.py",
    )
)


def smooth(n, seed, size=8, channels=3):
    """uint8 [n, size, size, channels] with few large-scale degrees of freedom, as pictures have."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(128, 40, (n, 2, 2, channels)).repeat(size // 2, 1).repeat(size // 2, 2)
    return (coarse + rng.normal(0, 8, coarse.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    np.savez(folder / "ref.npz", arr_0=smooth(400, 0))
    np.savez(folder / "samples.npz", arr_0=smooth(300, 1), arr_1=np.arange(300) % 10)
    return folder


def run(*args, **kwargs):
    return launch.run([sys.executable, *map(str, args)], timeout=120, **kwargs)


def evaluate(*args):
    done = run(EVALUATOR, *args, "--features", "pixels")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(path):
    return {
        name: entry["value"]
        for name, entry in json.loads(Path(path).read_text())["metrics"].items()
    }


def moments(x):
    rows = x.reshape(len(x), -1).astype(np.float64) / 255
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_numbers_are_those_of_the_arrays_and_the_json_tells_how(sets, tmp_path):
    out = evaluate(
        sets / "ref.npz", sets / "samples.npz", "--json", tmp_path / "r.json", "--batch_size", "37"
    )
    said = json.loads((tmp_path / "r.json").read_text())
    ref, samples = smooth(400, 0), smooth(300, 1)
    rows = [x.reshape(len(x), -1).astype(np.float32) / 255 for x in (ref, samples)]
    expected = frechet_distance(*moments(ref), *moments(samples))
    assert said["metrics"]["fid"]["value"] == pytest.approx(
        expected, rel=1e-6
    )  # pixels are float32
    assert (
        said["metrics"]["prec"]["value"],
        said["metrics"]["recall"]["value"],
    ) == precision_recall(*rows)
    assert said["metrics"]["fid"]["samples"] == 300 and said["metrics"]["fid"]["reference"] == 400
    assert (
        said["samples"]["sha256"]
        and said["versions"]["torch"]
        and said["features"]["name"] == "pixels"
    )
    assert "\nFrechet distance between covariances of 192 dimensions\n" in out, (
        "what takes long is said while it lasts"
    )
    assert (
        "sFID left out" in out
        and "Frechet distance" in out
        and not re.search(r"\bFID\b", out.replace("sFID", ""))
    )


@pytest.mark.parametrize("launcher", [launch.mpiexec, launch.torchrun])
def test_two_processes_give_the_same(launcher, sets, tmp_path):
    every = "fid,prec,recall,kid"
    evaluate(
        sets / "ref.npz", sets / "samples.npz", "--metrics", every, "--json", tmp_path / "one.json"
    )
    done = launcher(
        2,
        [
            EVALUATOR,
            str(sets / "ref.npz"),
            str(sets / "samples.npz"),
            "--features",
            "pixels",
            "--metrics",
            every,
            "--json",
            str(tmp_path / "two.json"),
        ],
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = numbers(tmp_path / "one.json"), numbers(tmp_path / "two.json")
    assert one.keys() == two.keys() == {"fid", "prec", "recall", "kid"}
    assert two == pytest.approx(one, rel=1e-11)
    assert done.stdout.count("Precision") == 1, "one rank prints"


def test_folder_zip_and_npz_of_the_same_images_agree(sets, tmp_path):
    images = smooth(40, 5)
    np.savez(tmp_path / "images.npz", arr_0=images)
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as packed:
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")
            packed.write(tmp_path / "folder" / f"{i:03d}.png", f"{i:03d}.png")
    results = []
    for name in ("images.npz", "folder", "images.zip"):
        evaluate(sets / "ref.npz", tmp_path / name, "--json", tmp_path / "r.json")
        results.append(numbers(tmp_path / "r.json"))
    assert results[0] == results[1] == results[2]


def test_reference_statistics_replace_the_images(sets, tmp_path):
    done = run(
        MAKE,
        sets / "ref.npz",
        "--out",
        tmp_path / "stats.npz",
        "--features",
        "pixels",
        "--keep_images",
        "50",
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "stats.npz") as stored:
        mean, cov = moments(smooth(400, 0))
        np.testing.assert_allclose(stored["mu"], mean, atol=1e-7)
        np.testing.assert_allclose(stored["sigma"], cov, atol=1e-7)
        assert stored["n"] == [400] and stored["arr_0"].shape == (50, 8, 8, 3)
    evaluate(tmp_path / "stats.npz", sets / "samples.npz", "--json", tmp_path / "a.json")
    evaluate(sets / "ref.npz", sets / "samples.npz", "--json", tmp_path / "b.json")
    a, b = (
        json.loads((tmp_path / "a.json").read_text())["metrics"],
        json.loads((tmp_path / "b.json").read_text())["metrics"],
    )
    assert a["fid"]["value"] == pytest.approx(b["fid"]["value"], rel=1e-9)
    assert a["fid"]["reference"] == 400 and a["prec"]["reference"] == 50


def test_statistics_alone_serve_fid_but_not_precision(sets, tmp_path):
    run(MAKE, sets / "ref.npz", "--out", tmp_path / "stats.npz", "--features", "pixels")
    out = evaluate(tmp_path / "stats.npz", sets / "samples.npz")
    assert "Precision left out" in out and "statistics only" in out
    done = run(
        EVALUATOR,
        tmp_path / "stats.npz",
        sets / "samples.npz",
        "--features",
        "pixels",
        "--metrics",
        "prec",
    )
    assert done.returncode == 2 and "Precision cannot be had" in done.stderr


def test_statistics_in_the_samples_are_ignored_and_said(sets, tmp_path):
    np.savez(tmp_path / "both.npz", arr_0=smooth(300, 1), mu=np.zeros(192), sigma=np.eye(192))
    done = run(
        EVALUATOR,
        "--ref",
        sets / "ref.npz",
        "--samples",
        tmp_path / "both.npz",
        "--features",
        "pixels",
        "--json",
        tmp_path / "r.json",
    )
    assert done.returncode == 0 and "ignored" in done.stdout
    evaluate(sets / "ref.npz", sets / "samples.npz", "--json", tmp_path / "s.json")
    assert numbers(tmp_path / "r.json") == numbers(tmp_path / "s.json")


def test_a_collapsed_set_has_high_precision_and_low_recall(sets, tmp_path):
    few = smooth(400, 0)[:4].repeat(60, axis=0).astype(int)
    nearly = (
        (few + np.random.default_rng(2).integers(-1, 2, few.shape)).clip(0, 255).astype(np.uint8)
    )
    np.savez(tmp_path / "collapsed.npz", arr_0=nearly)
    evaluate(sets / "ref.npz", tmp_path / "collapsed.npz", "--json", tmp_path / "r.json")
    found = numbers(tmp_path / "r.json")
    assert found["prec"] > 0.95 and found["recall"] < 0.05


def test_sets_prepared_differently_are_a_warning(sets, tmp_path):
    np.savez(
        tmp_path / "ref.npz",
        arr_0=smooth(400, 0),
        preprocessing=np.array(["faces > crop=center 8x8x3"]),
    )
    (tmp_path / "run").mkdir()
    np.savez(tmp_path / "run" / "samples.npz", arr_0=smooth(300, 1))
    for record, warned in (("faces > crop=center 8x8x3", False), ("faces > crop=none 8x8x3", True)):
        (tmp_path / "run" / "settings.yaml").write_text(
            yaml.safe_dump({"trained_on": record, "seed": 3})
        )
        out = evaluate(
            tmp_path / "ref.npz", tmp_path / "run" / "samples.npz", "--json", tmp_path / "r.json"
        )
        assert ("prepared differently" in out) is warned
        assert json.loads((tmp_path / "r.json").read_text())["made_with"]["seed"] == 3


def test_few_images_are_labelled_and_warned_about(sets):
    out = evaluate(sets / "ref.npz", sets / "samples.npz", "--num_samples", "100")
    assert "Frechet distance@100" in out and "biased" in out


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


BAD = {
    "float 0..1": (dict(arr_0=np.full((8, 8, 8, 3), 0.5)), "looks like [0, 1]"),
    "float -1..1": (
        dict(arr_0=np.linspace(-1, 1, 8 * 192).reshape(8, 8, 8, 3)),
        "looks like [-1, 1]",
    ),
    "float in between": (dict(arr_0=np.full((8, 8, 8, 3), 7.25)), "whole numbers"),
    "not finite": (dict(arr_0=np.full((8, 8, 8, 3), np.nan)), "not finite"),
    "NCHW": (dict(arr_0=np.zeros((8, 3, 8, 8), np.uint8)), "looks like [N, C, H, W]"),
    "another type": (dict(arr_0=np.zeros((8, 8, 8, 3), np.int32)), "but must be uint8 0..255"),
    "grey without channels": (dict(arr_0=np.zeros((8, 8, 8), np.uint8)), "needs a channel axis"),
    "other keys": (dict(images=np.zeros((8, 8, 8, 3), np.uint8)), "images may be what is meant"),
    "another size": (
        dict(arr_0=np.zeros((8, 16, 16, 3), np.uint8)),
        "samples 16 x 16 (height x width)",
    ),
    "no images": (dict(arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "no images"),
    "too few": (dict(arr_0=smooth(3, 0)), "at least 4"),
    "mu alone": (dict(arr_0=smooth(8, 0), mu=np.zeros(192)), "swapped|order is REF SAMPLES"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_samples_are_one_line(case, sets, tmp_path):
    arrays, words = BAD[case]
    complains(words, sets / "ref.npz", save(tmp_path / "bad.npz", **arrays))


def complains(words, *args):
    done = run(EVALUATOR, *args, "--features", "pixels")
    lines = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith("warning:") and "img/s" not in line
    ]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert any(word in lines[0] for word in words.split("|")), lines[0]


def test_files_that_are_no_sets_of_images(sets, tmp_path):
    ref = sets / "ref.npz"
    whole = ref.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    complains("cannot be read as an npz", ref, tmp_path / "cut.npz")
    np.save(tmp_path / "x.npy", smooth(8, 0))
    complains(".npy file", ref, tmp_path / "x.npy")
    (tmp_path / "text.npz").write_text("hello")
    complains("cannot be read as an npz", ref, tmp_path / "text.npz")
    complains("does not exist", ref, tmp_path / "nowhere.npz")
    complains("two arguments", ref)
    (tmp_path / "empty").mkdir()
    complains("no images", ref, tmp_path / "empty")
    complains("no metric", ref, ref, "--metrics", "fid,ssim")


def test_pickled_objects_are_refused_and_do_not_run(sets, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "boom",)

    np.savez(tmp_path / "evil.npz", arr_0=np.array([Bomb()], dtype=object))
    complains("Python objects", sets / "ref.npz", tmp_path / "evil.npz")
    assert not (tmp_path / "boom").exists()


def test_stored_statistics_are_checked(sets, tmp_path):
    for arrays, words in (
        (dict(mu=np.zeros(192)), "not sigma"),
        (dict(mu=np.zeros(10), sigma=np.eye(10)), "expected [192]"),
        (dict(mu=np.full(192, np.nan), sigma=np.eye(192)), "not finite"),
        (
            dict(mu=np.zeros(192), sigma=np.eye(192), features=np.array(["inception 0123"])),
            "inception",
        ),
    ):
        complains(words, save(tmp_path / "stats.npz", **arrays), sets / "samples.npz")


def test_pictures_of_different_sizes_need_image_size(sets, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, size in enumerate((8, 8, 16, 8, 8)):
        Image.fromarray(smooth(1, i, size)[0]).save(folder / f"{i}.png")
    complains("--image_size", sets / "ref.npz", folder)
    out = evaluate(sets / "ref.npz", folder, "--image_size", "8")
    assert "5" in out


def test_two_sides_of_different_sizes_are_an_error_that_names_the_flag_and_its_value(
    sets, tmp_path
):
    np.savez(tmp_path / "large.npz", arr_0=smooth(400, 0, 16))
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(smooth(6, 0, 16)):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    np.savez(tmp_path / "wide.npz", arr_0=smooth(20, 0)[:, :4])
    complains("give --image_size 8 ", tmp_path / "large.npz", sets / "samples.npz")
    complains("give --image_size 8 ", tmp_path / "folder", sets / "samples.npz")
    complains("give --image_size 8 ", sets / "ref.npz", tmp_path / "folder")
    complains("give --image_size 4x8 ", sets / "ref.npz", tmp_path / "wide.npz")
    # With the flag, both sides are scaled as training scales them, npz files too.
    evaluate(
        tmp_path / "large.npz",
        sets / "samples.npz",
        "--image_size",
        "8",
        "--json",
        tmp_path / "a.json",
    )
    small = np.stack([center_crop_arr(Image.fromarray(image), 8) for image in smooth(400, 0, 16)])
    np.savez(
        tmp_path / "small.npz",
        arr_0=small,
        preprocessing=np.array(["images > crop=center resize=box+bicubic 8x8x3"]),
    )
    evaluate(tmp_path / "small.npz", sets / "samples.npz", "--json", tmp_path / "b.json")
    assert numbers(tmp_path / "a.json") == numbers(tmp_path / "b.json")
    a, b = (json.loads((tmp_path / f"{name}.json").read_text())["reference"] for name in "ab")
    assert (a["image_shape"], a["preprocessing"]) == (b["image_shape"], b["preprocessing"])


def test_images_with_statistics_are_not_scaled_away_from_them(sets, tmp_path):
    done = run(
        MAKE,
        save(tmp_path / "large.npz", arr_0=smooth(30, 0, 16)),
        "--out",
        tmp_path / "stats.npz",
        "--features",
        "pixels",
        "--keep_images",
        "10",
    )
    assert done.returncode == 0, done.stderr
    complains("give --image_size 16 ", tmp_path / "stats.npz", sets / "samples.npz")
    complains(
        "images, which cannot be scaled to 8 x 8: make it again from its images with "
        "evaluations/make_reference.py --image_size, or give --image_size 16",
        tmp_path / "stats.npz",
        sets / "samples.npz",
        "--image_size",
        "8",
    )
    evaluate(tmp_path / "stats.npz", sets / "samples.npz", "--image_size", "16")


def test_pixels_of_large_images_are_refused_at_once_with_what_to_do(tmp_path):
    save(tmp_path / "a.npz", arr_0=smooth(10, 0, 64))
    save(tmp_path / "b.npz", arr_0=smooth(120, 1, 64))
    complains(
        "use inception or an ONNX model as features, or smaller images (evaluations: "
        "--image_size 32)",
        tmp_path / "a.npz",
        tmp_path / "b.npz",
    )
    evaluate(tmp_path / "a.npz", tmp_path / "b.npz", "--image_size", "4")


@pytest.mark.parametrize(
    "shape, fine",
    [
        ((2, 3, 8, 3), True),
        ((2, 1, 8, 1), True),
        ((2, 3, 8, 1), True),
        ((2, 1, 8, 3), True),
        ((2, 3, 8, 8), False),
        ((2, 1, 8, 8), False),
        ((2, 3, 8, 4), False),
    ],
)
def test_channels_first_is_told_from_images_of_one_or_three_rows(shape, fine, tmp_path):
    save(tmp_path / "x.npz", arr_0=np.zeros(shape, np.uint8))
    if fine:
        assert open_images(tmp_path / "x.npz", "samples").shape == shape[1:]
    else:
        with pytest.raises(ValueError, match=r"looks like \[N, C, H, W\]"):
            open_images(tmp_path / "x.npz", "samples")


def test_grey_npz_files_are_scaled(tmp_path):
    grey = smooth(5, 0, 16, channels=1)
    np.savez(tmp_path / "grey.npz", arr_0=grey)
    images = open_images(tmp_path / "grey.npz", "samples", (8, 4))
    assert images.shape == (8, 4, 1) and images.rows(1, 1).shape == (0, 8, 4, 1)
    expected = np.stack([center_crop_arr(Image.fromarray(image[..., 0]), (8, 4)) for image in grey])
    assert np.array_equal(np.concatenate(list(images.batches(0, 5, 2)))[..., 0], expected)


def test_npz_to_png_and_back(sets, tmp_path):
    images = smooth(12, 3)
    np.savez(tmp_path / "x.npz", arr_0=images, arr_1=np.arange(12) % 3)
    assert (
        run(
            NPZ_TO_PNG, tmp_path / "x.npz", "--out", tmp_path / "pictures", "--classes", "False"
        ).returncode
        == 0
    )
    assert run(NPZ_TO_PNG, tmp_path / "pictures", "--out", tmp_path / "back.npz").returncode == 0
    with np.load(tmp_path / "back.npz") as back:
        np.testing.assert_array_equal(back["arr_0"], images)
    assert run(NPZ_TO_PNG, tmp_path / "x.npz", "--out", tmp_path / "classes").returncode == 0
    assert sorted(path.name for path in (tmp_path / "classes").iterdir()) == ["0", "1", "2"]
    assert (
        run(
            NPZ_TO_PNG, tmp_path / "x.npz", "--out", tmp_path / "grid.png", "--count", "9"
        ).returncode
        == 0
    )
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 64
    again = run(NPZ_TO_PNG, tmp_path / "x.npz", "--out", tmp_path / "grid.png")
    assert again.returncode == 2 and "already" in again.stderr


def test_published_values_need_the_papers_own_settings():
    paper = {"fid_ddpm": {100: 3.37}, "eps_scaler": {100: 1.017}, "fid_eps_scaler": {100: 2.17}}
    base = {"timestep_respacing": "100", "eps_scaler": 1.0, "eps_scaler_k": 0.0, "use_ddim": False}
    assert published_values(paper, base) == {"fid": 3.37}
    assert published_values(paper, base | {"eps_scaler": 1.017}) == {"fid": 2.17}
    for other in (
        {"eps_scaler": 1.01},
        {"use_ddim": True},
        {"timestep_respacing": "50"},
        {"eps_scaler_k": 1e-3},
    ):
        assert published_values(paper, base | other) == {}
    assert published_values(paper, {}) == {}
    for guided in ({"guidance_scale": 2.0}, {"classifier_scale": 1.0}):
        assert published_values(paper, base | guided) == {}
    paper |= {
        "classifier_scale": 0.5,
        "fid_guided_without": {100: 3.55},
        "fid_guided_eps_scaler": {100: 3.4},
    }
    guided = base | {"classifier_scale": 0.5, "guidance_scale": 1.0}
    assert published_values(paper, guided) == {"fid": 3.55} and published_values(paper, base) == {
        "fid": 3.37
    }
    assert published_values(paper, guided | {"eps_scaler": 1.017}) == {"fid": 3.4}
    assert published_values(paper, guided | {"classifier_scale": 1.0}) == {}, (
        "another scale is another table"
    )
    assert published_values(paper | {"fid_guided": {100: 2.9}}, guided) == {"fid": 2.9}


def test_metric_names():
    assert parse_metrics("FID, is,fid") == ["fid", "is"]
    with pytest.raises(ValueError, match="no metric"):
        parse_metrics("fid,foo")
