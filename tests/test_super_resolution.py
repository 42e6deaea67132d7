"""Super-resolution: pairs of images, and both scripts as a user runs them."""

import os
import pickle
import sys
import zipfile
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_scripts import Evil, flags, one_line, run

from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.data.image_io import save_grid, to_model_range
from guided_diffusion_ip.data.image_set import open_image_set
from guided_diffusion_ip.data.super_resolution import (
    SuperResolutionStream,
    area_average,
    check_sizes,
)
from guided_diffusion_ip.runs.base_images import picture_names
from guided_diffusion_ip.runs.sample_batch import Sampler, process_sampler
from guided_diffusion_ip.script_util import (
    create_model_and_diffusion,
    sr_create_model_and_diffusion,
)
from guided_diffusion_ip.training.preview import Preview

ROOT = Path(__file__).resolve().parent.parent
NETWORK = dict(
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    learn_sigma=True,
    noise_schedule="cosine",
    num_head_channels=32,
    class_cond=True,
    num_classes=3,
)
TINY = dict(large_size=8, small_size=4, **NETWORK)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """12 images of 8 x 8 in three class folders."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(
            folder / str(i % 3) / f"{i}.png"
        )
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Five images of 4 x 4 with labels, as npz, folder and zip: (paths by kind, pixels, labels)."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(1)
    pixels, labels = rng.integers(0, 256, (5, 4, 4, 1), dtype=np.uint8), np.array([0, 0, 1, 2, 2])
    np.savez(root / "small.npz", arr_0=pixels, arr_1=labels)
    (root / "folder").mkdir()
    with zipfile.ZipFile(root / "small.zip", "w") as archive:
        for i, (image, label) in enumerate(zip(pixels, labels)):
            path = root / "folder" / f"{label}_{i}.png"
            Image.fromarray(image[..., 0]).save(path)
            archive.write(path, path.name)
    return (
        {
            kind: str(root / name)
            for kind, name in (("npz", "small.npz"), ("folder", "folder"), ("zip", "small.zip"))
        },
        pixels,
        labels,
    )


@pytest.fixture(scope="module")
def trained(large, tmp_path_factory):
    """A run of four steps, by a real process: (folder, what it said)."""
    out = tmp_path_factory.mktemp("run") / "trained"
    done = launch.run(
        [
            sys.executable,
            "scripts/super_res_train.py",
            *flags(**TINY),
            "--data_dir",
            large,
            "--out_dir",
            str(out),
            "--max_steps",
            "4",
            "--batch_size",
            "3",
            "--ema_rate",
            "0.5",
            "--sample_interval",
            "2",
            "--sample_count",
            "5",
            "--sample_respacing",
            "3",
            "--log_interval",
            "1",
            "--save_interval",
            "2",
            "--input_perturbation",
            "0.1",
        ]
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


# ---- pairs ----


def test_a_small_pixel_is_the_mean_of_those_that_it_covers():
    x = torch.rand(2, 3, 8, 12)
    torch.testing.assert_close(area_average(x, (4, 3)), x.reshape(2, 3, 4, 2, 3, 4).mean((3, 5)))


def stream(large, **options):
    images = load_data(
        data_dir=large, batch_size=3, image_size=8, class_cond=True, channels=1, **options
    )
    return SuperResolutionStream(images, (8, 8), (4, 4))


def test_batches_are_those_of_the_large_images_with_the_small_ones_beside(large):
    plain, pairs = (
        load_data(data_dir=large, batch_size=3, image_size=8, class_cond=True, channels=1),
        stream(large),
    )
    for _ in range(3):
        (x, cond), (x_pair, cond_pair) = next(plain), next(pairs)
        assert (
            torch.equal(x, x_pair)
            and set(cond_pair) == {"low_res", "y"}
            and torch.equal(cond["y"], cond_pair["y"])
        )
        assert torch.equal(cond_pair["low_res"], area_average(x, (4, 4))), (
            "also of a mirrored image"
        )
    assert (pairs.step, pairs.num_images, pairs.classes, pairs.value_range) == (
        3,
        12,
        ["0", "1", "2"],
        (-1.0, 1.0),
    )


def test_seek_makes_a_pair_come_again(large):
    pairs = stream(large)
    batches = [next(pairs) for _ in range(6)]
    pairs.seek(4)
    again = next(pairs)
    assert torch.equal(again[0], batches[4][0]) and torch.equal(
        again[1]["low_res"], batches[4][1]["low_res"]
    )


def test_examples_are_the_same_on_every_rank_and_unmirrored(large):
    first = stream(large).examples(14)
    second = stream(large, rank=1, world=2).examples(14)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1]["y"], second[1]["y"])
    assert len(torch.unique(first[0], dim=0)) == 12, "all, then two again"
    known = open_image_set(large, (8, 8), 1).images(range(12))
    assert all((known == x).flatten(1).all(1).any() for x in first[0])


@pytest.mark.parametrize(
    "big, little, message",
    [
        ((8, 8), (8, 8), "nothing to enlarge"),
        ((8, 8), (3, 3), "multiple of small_size, such as --large_size 9"),
        ((4, 4), (8, 8), "--large_size 16"),
        ((8, 12), (4, 5), "large_size is 8x12 and small_size 4x5"),
    ],
)
def test_sizes_that_do_not_fit(big, little, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(big, little)


def test_the_preview_hands_on_what_belongs_to_each_picture(tmp_path):
    low = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 4, 4)
    diffusion = sr_create_model_and_diffusion(**TINY, predict_xstart=True, timestep_respacing="2")[
        1
    ]

    def network(x, t, low_res):
        enlarged = torch.nn.functional.interpolate(low_res, (8, 8))
        return torch.cat([enlarged, torch.zeros_like(enlarged)], dim=1)

    preview = Preview(
        process_sampler(diffusion, (1, 8, 8), solver="ddim"),
        5,
        str(tmp_path),
        2,
        kwargs_for=lambda index: {"low_res": low[index]},
    )
    expected = ((low + 1) * 127.5).to(torch.uint8).repeat(1, 1, 2, 2).permute(0, 2, 3, 1)
    save_grid(expected.numpy(), tmp_path / "expected.png")
    assert preview(network, 7) == {}
    got, want = (
        np.asarray(Image.open(tmp_path / name)).astype(int)
        for name in ("samples_000007.png", "expected.png")
    )
    assert np.abs(got - want).max() <= 1


# ---- training ----


def test_training_leaves_what_is_needed(trained, large):
    out, said = trained
    for fact in (
        "12, [1, 8, 8]",
        "low-resolution images: 4 x 4, by area averaging",
        "3 classes",
        "gamma 0.1",
        "after 4 steps",
    ):
        assert fact in said, fact
    assert {
        "config.yaml",
        "model000004.pt",
        "ema_0.5_000004.pt",
        "opt000004.pt",
        "progress.csv",
        "samples_000002.png",
        "samples_000004.png",
        "low_res.png",
        "large.png",
    } <= set(os.listdir(out))
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (
        saved["super_res"] == {"large_size": 8, "small_size": 4}
        and "image_size" not in saved["model"]
    )
    state = torch.load(out / "model000004.pt", weights_only=True)
    assert state["input_blocks.0.0.weight"].shape[1] == 2
    examples = stream(large).examples(5)
    sheet = np.asarray(Image.open(out / "low_res.png"))
    pixel = ((examples[1]["low_res"][0, 0, 0, 0] + 1) * 127.5).to(torch.uint8)
    assert abs(int(sheet[2, 2]) - int(pixel)) <= 1, "the picture shows the fixed examples"


def test_a_resumed_run_ends_as_an_uninterrupted_one(trained, large, tmp_path, capsys, monkeypatch):
    out, _ = trained
    code, said, err = run(
        "super_res_train",
        "--config",
        str(out / "config.yaml"),
        "--data_dir",
        large,
        "--out_dir",
        str(tmp_path / "b"),
        "--resume_checkpoint",
        str(out / "model000002.pt"),
        "--sample_interval",
        "0",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0 and "2 steps done" in said, err
    for name in ("model000004.pt", "ema_0.5_000004.pt"):
        ours, theirs = (
            torch.load(folder / name, weights_only=True) for folder in (out, tmp_path / "b")
        )
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=1e-5, msg=key)


# ---- sampling ----


def sample(trained, base, out, *more, capsys, monkeypatch):
    """The samples and labels that the script leaves."""
    code, said, err = run(
        "super_res_sample",
        "--model_path",
        str(trained[0] / "ema_0.5_000004.pt"),
        "--base_samples",
        base,
        "--timestep_respacing",
        "2",
        "--out_dir",
        str(out),
        *more,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    assert "step 2/2" in err, "the bar moves with the steps"
    with np.load(next(Path(out).glob("samples_*.npz"))) as npz:
        return npz["arr_0"], npz["arr_1"], said


def test_image_i_is_made_from_base_sample_i_mod_count(
    trained, small, tmp_path, capsys, monkeypatch
):
    paths, pixels, labels = small
    images, y, said = sample(
        trained,
        paths["npz"],
        tmp_path / "npz",
        "--num_samples",
        "12",
        "--batch_size",
        "5",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert images.shape == (12, 8, 8, 1) and y.tolist() == [*labels, *labels, *labels[:2]]
    assert "5 images" in said and "each of them 2.4 times" in said

    model, diffusion = sr_create_model_and_diffusion(**TINY, timestep_respacing="2")
    model.load_state_dict(torch.load(trained[0] / "ema_0.5_000004.pt", weights_only=True))
    model.eval()
    which = np.arange(12) % 5
    direct = process_sampler(diffusion, (1, 8, 8))(
        model,
        range(12),
        {"low_res": to_model_range(pixels[which]), "y": torch.from_numpy(labels[which])},
    )
    expected = ((direct + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - expected).max() < 1.01

    settings = yaml.safe_load((tmp_path / "npz" / "settings.yaml").read_text())
    for kind in ("folder", "zip"):  # sorted names are the order of the npz's rows
        other, y, _ = sample(
            trained,
            paths[kind],
            tmp_path / kind,
            "--num_samples",
            "12",
            "--batch_size",
            "5",
            capsys=capsys,
            monkeypatch=monkeypatch,
        )
        np.testing.assert_array_equal(other, images)
        same = yaml.safe_load((tmp_path / kind / "settings.yaml").read_text())
        assert same["base_sha256"] == settings["base_sha256"], "the digest is that of the images"


def test_other_base_samples_are_refused_in_the_same_folder(
    trained, small, tmp_path, capsys, monkeypatch
):
    paths, pixels, labels = small
    sample(
        trained,
        paths["npz"],
        tmp_path / "out",
        "--num_samples",
        "2",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    (tmp_path / "more").mkdir()
    np.savez(tmp_path / "more" / "small.npz", arr_0=255 - pixels, arr_1=labels)
    code, _, err = run(
        "super_res_sample",
        "--model_path",
        str(trained[0] / "ema_0.5_000004.pt"),
        "--base_samples",
        str(tmp_path / "more" / "small.npz"),
        "--timestep_respacing",
        "2",
        "--num_samples",
        "2",
        "--out_dir",
        str(tmp_path / "out"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and "base_sha256" in err


def test_two_processes_sample_the_same(trained, small, tmp_path, capsys, monkeypatch):
    paths, _, _ = small
    one, y, _ = sample(
        trained,
        paths["npz"],
        tmp_path / "one",
        "--num_samples",
        "7",
        "--batch_size",
        "2",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    done = launch.mpiexec(
        2,
        [
            str(ROOT / "scripts" / "super_res_sample.py"),
            "--model_path",
            str(trained[0] / "ema_0.5_000004.pt"),
            "--base_samples",
            paths["npz"],
            "--timestep_respacing",
            "2",
            "--num_samples",
            "7",
            "--batch_size",
            "2",
            "--out_dir",
            str(tmp_path / "two"),
        ],
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "two" / "samples_7x8x8x1.npz") as two:
        assert np.abs(two["arr_0"].astype(int) - one).max() <= 1
        np.testing.assert_array_equal(two["arr_1"], y)


def labelled_base_npz(folder, capsys, monkeypatch):
    """What image_sample leaves of a class-conditional 4 x 4 model: (path, pixels, labels)."""
    torch.manual_seed(3)
    model = create_model_and_diffusion(image_size=4, **NETWORK)[0]
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    torch.save(model.state_dict(), folder / "base.pt")
    code, _, err = run(
        "image_sample",
        "--model_path",
        str(folder / "base.pt"),
        *flags(image_size=4, **NETWORK),
        "--num_samples",
        "5",
        "--timestep_respacing",
        "3",
        "--out_dir",
        str(folder / "base"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    path = folder / "base" / "samples_5x4x4x1.npz"
    with np.load(path) as npz:
        return str(path), npz["arr_0"], npz["arr_1"]


def test_samples_of_a_base_model_are_enlarged_with_their_labels_by_ddim_and_lambda(
    trained, tmp_path, capsys, monkeypatch
):
    """The chain of ADM-U: image_sample's npz goes into super_res_sample; output i is what Sampler
    makes of image i and label i.
    """
    path, pixels, labels = labelled_base_npz(tmp_path, capsys, monkeypatch)
    state = torch.load(
        trained[0] / "ema_0.5_000004.pt", weights_only=True
    )  # four steps after zeros: epsilon is 0, lambda idle
    state = {name: value + 0.1 * torch.randn(value.shape) for name, value in state.items()}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((trained[0] / "config.yaml").read_bytes())
    torch.save(state, tmp_path / "run" / "ema_0.5_000004.pt")
    trained = (tmp_path / "run",)
    options = ["--num_samples", "5", "--use_ddim", "True", "--eta", "0.5", "--eps_scaler", "1.05"]
    images, y, said = sample(
        trained, path, tmp_path / "large", *options, capsys=capsys, monkeypatch=monkeypatch
    )
    assert y.tolist() == labels.tolist() and "each of them once" in said and "note" not in said
    plain, _, _ = sample(
        trained,
        path,
        tmp_path / "plain",
        *options[:-1],
        "1",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert (plain != images).any(), "lambda does something"

    model, diffusion = sr_create_model_and_diffusion(
        **TINY, timestep_respacing="2", eps_scaler=1.05
    )
    model.load_state_dict(state)
    direct = process_sampler(diffusion, (1, 8, 8), solver="ddim", eta=0.5)(
        model.eval(), range(5), {"low_res": to_model_range(pixels), "y": torch.from_numpy(labels)}
    )
    expected = ((direct + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - expected).max() < 1.01


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    trained, small, tmp_path, capsys, monkeypatch
):
    argv = ["--num_samples", "7", "--batch_size", "2"]
    whole, y, _ = sample(
        trained,
        small[0]["folder"],
        tmp_path / "whole",
        *argv,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    calls, call = [], Sampler.__call__

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", interrupted)
        code, _, err = run(
            "super_res_sample",
            "--model_path",
            str(trained[0] / "ema_0.5_000004.pt"),
            "--base_samples",
            small[0]["folder"],
            "--timestep_respacing",
            "2",
            "--out_dir",
            str(tmp_path / "cut"),
            *argv,
            capsys=capsys,
            monkeypatch=patch,
        )
    assert code == 130 and len(list((tmp_path / "cut" / "shards").iterdir())) == 2, err
    images, labels, _ = sample(
        trained, small[0]["folder"], tmp_path / "cut", *argv, capsys=capsys, monkeypatch=monkeypatch
    )
    np.testing.assert_array_equal(images, whole)
    np.testing.assert_array_equal(labels, y)


def test_pictures_have_the_names_of_the_files_that_they_were_made_from(
    trained, tmp_path, capsys, monkeypatch
):
    for i, name in enumerate(("dog/b.png", "dog/a.png", "cat/x.bmp", "cat/x.png", "cow/1.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 50 * i, np.uint8)).save(tmp_path / "in" / name)
    images, y, said = sample(
        trained,
        str(tmp_path / "in"),
        tmp_path / "out",
        "--num_samples",
        "6",
        "--save_png",
        "True",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert y.tolist() == [0, 0, 1, 2, 2, 0], "classes and images in the order of their names"
    names = ["cat/x", "cat/x~", "cow/1", "dog/a", "dog/b", "cat/x~2"]
    for image, name in zip(images, names):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "out" / "png" / f"{name}.png")), image[..., 0]
        )
    assert len(list((tmp_path / "out" / "png").rglob("*.*"))) == 6
    table = (tmp_path / "out" / "base_images.csv").read_text().splitlines()
    assert table == [
        "image,base_image,base_name",
        "0,0,cat/x.bmp",
        "1,1,cat/x.png",
        "2,2,cow/1.png",
        "3,3,dog/a.png",
        "4,4,dog/b.png",
        "5,0,cat/x.bmp",
    ]
    assert "base_images.csv" in said


def test_names_come_once_and_stay_inside():
    assert picture_names(["../../etc/x.png", "/etc/x.png", "a.b.png", "~.png"], 9) == [
        "etc/x",
        "etc/x~",
        "a.b",
        "~",
        "etc/x~2",
        "etc/x~2~",
        "a.b~2",
        "~~2",
        "etc/x~3",
    ]


def test_images_of_another_size_are_scaled_if_asked_for(
    trained, small, tmp_path, capsys, monkeypatch
):
    _, pixels, labels = small
    large = tmp_path / "large"
    large.mkdir()
    for i, (image, label) in enumerate(zip(pixels.repeat(2, 1).repeat(2, 2), labels)):
        Image.fromarray(image[..., 0]).save(large / f"{label}_{i}.png")
    np.savez(tmp_path / "large.npz", arr_0=pixels.repeat(2, 1).repeat(2, 2), arr_1=labels)
    exact, _, _ = sample(
        trained,
        small[0]["npz"],
        tmp_path / "exact",
        "--num_samples",
        "5",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    for source in (large, tmp_path / "large.npz"):
        out = tmp_path / f"of_{source.name}"
        scaled, y, _ = sample(
            trained,
            str(source),
            out,
            "--num_samples",
            "5",
            "--resize_base",
            "True",
            capsys=capsys,
            monkeypatch=monkeypatch,
        )
        np.testing.assert_array_equal(
            scaled, exact
        )  # doubling and halving gives the same small images
        assert y.tolist() == labels.tolist()


def test_what_may_not_be_meant_is_said(trained, small, tmp_path, capsys, monkeypatch):
    (tmp_path / "two").mkdir()
    for name in ("10_a", "2_a"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "two" / f"{name}.png")
    with monkeypatch.context() as patch:  # 10,000 images would take too long: stop at the first
        patch.setattr(
            Sampler, "__call__", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        code, said, _ = run(
            "super_res_sample",
            "--model_path",
            str(trained[0] / "ema_0.5_000004.pt"),
            "--base_samples",
            str(tmp_path / "two"),
            "--timestep_respacing",
            "2",
            "--out_dir",
            str(tmp_path / "out"),
            capsys=capsys,
            monkeypatch=patch,
        )
    assert code == 130 and "(10 is label 0, 2 label 1), but the model knows 3" in said
    assert "--num_samples is 10000 by default; --num_samples 2 makes each image once" in said


# ---- wrong input ----

BAD_TRAINING = {
    "no data": (["--data_dir="], "--data_dir"),
    "missing data": (["--data_dir", "{tmp}/nowhere"], "nowhere"),
    "not a multiple": (["--small_size", "3"], "such as --large_size 9"),
    "too small": (["--small_size", "16"], "such as --large_size 32"),
    "equal": (["--small_size", "8"], "nothing to enlarge"),
    "levels": (["--channel_mult", "1,1,1,1,1"], "multiples of 16"),
    "image_size": (["--image_size", "8"], "unknown argument --image_size"),
    "classes": (["--num_classes", "2"], "--num_classes 3"),
    "resume": (["--resume_checkpoint", "{tmp}/model000009.pt"], "model000009.pt"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_input_for_training(case, large, tmp_path, capsys, monkeypatch):
    argv, hint = BAD_TRAINING[case]
    out = tmp_path / "out"
    code, _, err = run(
        "super_res_train",
        *flags(**TINY),
        "--data_dir",
        large,
        "--max_steps",
        "1",
        "--out_dir",
        str(out),
        "--sample_interval",
        "1",
        "--sample_respacing",
        "2",
        *(word.replace("{tmp}", str(tmp_path)) for word in argv),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and hint in err, err
    assert not out.exists(), "nothing half-written is left behind"


BAD_SAMPLING = {
    "no base": (["--base_samples="], "--base_samples"),
    "missing base": (["--base_samples", "{tmp}/none.npz"], "none.npz does not exist"),
    "the flag is named": (["--base_samples", "{tmp}/none.npz"], "--base_samples: "),
    "empty folder": (["--base_samples", "{tmp}/empty"], "holds no images"),
    "other kind": (["--base_samples", "{tmp}/truncated.pt"], "another kind"),
    "truncated": (["--base_samples", "{tmp}/truncated.npz"], "truncated.npz"),
    "broken image": (["--base_samples", "{tmp}/broken"], "0_1.png"),
    "pickled": (["--base_samples", "{tmp}/evil.npz"], "Python objects"),
    "size": (
        ["--base_samples", "{tmp}/large.npz"],
        "8 x 8 with 1 channels, but the model takes 4 x 4 with 1: add --resize_base",
    ),
    "size of a file": (
        ["--base_samples", "{tmp}/mixed"],
        "1_1.png is 5 x 4, but the model takes 4 x 4: add --resize_base True",
    ),
    "channels": (["--base_samples", "{tmp}/rgb.npz"], "4 x 4 with 3 channels"),
    "floats": (["--base_samples", "{tmp}/floats.npz"], "must be uint8"),
    "no labels": (["--base_samples", "{tmp}/unlabelled.npz"], "arr_1"),
    "no labels in a folder": (["--base_samples", "{tmp}/plain"], "no classes found"),
    "labels too large": (
        ["--base_samples", "{tmp}/labels.npz"],
        "10 classes, but the model knows 3",
    ),
    "class ids": (["--class_ids", "1"], "labels come with the low-resolution images"),
    "large_size": (["--large_size", "16"], "trained with large_size 8"),
    "bare, not a multiple": (
        ["--model_path", "{tmp}/bare.pt", "--small_size", "3"],
        "such as --large_size 9",
    ),
    "bare, other width": (
        ["--model_path", "{tmp}/bare.pt", "--num_channels", "64"],
        "--num_channels 32 (now 64)",
    ),
    "bare, other channels": (
        ["--model_path", "{tmp}/bare.pt", "--in_channels", "3"],
        "--in_channels 1 (now 3)",
    ),
    "bare, other levels": (
        ["--model_path", "{tmp}/bare.pt", "--channel_mult", "1,2"],
        "--channel_mult 1,1 (now 1,2)",
    ),
    "image model": (["--model_path", "{tmp}/image.pt"], "it is an image model"),
    "no checkpoint": (["--model_path="], "--model_path"),
    "truncated checkpoint": (["--model_path", "{tmp}/truncated.pt"], "truncated.pt"),
    "malicious checkpoint": (["--model_path", "{tmp}/evil.pt"], "evil.pt"),
    "optimizer": (["--model_path", "{run}/opt000004.pt"], "model or ema file"),
    "eta without ddim": (["--eta", "0.5"], "--use_ddim True"),
    "lambda": (["--eps_scaler", "0"], "lambda(t) > 0"),
}


def write_bad_files(tmp_path, run_dir):
    weights = (run_dir / "model000004.pt").read_bytes()
    (tmp_path / "bare.pt").write_bytes(weights)
    (tmp_path / "truncated.pt").write_bytes(weights[:1000])
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(str(tmp_path / "pwned"))))
    torch.save(
        create_model_and_diffusion(image_size=8, **NETWORK)[0].state_dict(), tmp_path / "image.pt"
    )
    pixels, labels = np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1])
    np.savez(tmp_path / "whole.npz", arr_0=pixels, arr_1=labels)
    (tmp_path / "truncated.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    np.savez(tmp_path / "evil.npz", arr_0=np.array([Evil(str(tmp_path / "pwned"))], dtype=object))
    for name, arrays in {
        "large": (np.zeros((2, 8, 8, 1), np.uint8), labels),
        "rgb": (pixels.repeat(3, 3), labels),
        "floats": (pixels / 255, labels),
        "unlabelled": (pixels,),
        "labels": (pixels, labels * 9),
    }.items():
        np.savez(tmp_path / f"{name}.npz", *arrays)
    for name, files in {
        "empty": {},
        "mixed": {"0_0": (4, 4), "1_1": (5, 4)},
        "plain": {"a": (4, 4), "b": (4, 4)},
        "broken": {"0_0": (4, 4)},
    }.items():
        (tmp_path / name).mkdir()
        for file, shape in files.items():
            Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / name / f"{file}.png")
    (tmp_path / "broken" / "0_1.png").write_bytes(
        (tmp_path / "broken" / "0_0.png").read_bytes()[:40]
    )


@pytest.mark.parametrize("case", BAD_SAMPLING)
def test_bad_input_for_sampling(case, trained, small, tmp_path, capsys, monkeypatch):
    run_dir, _ = trained
    write_bad_files(tmp_path, run_dir)
    argv, hint = BAD_SAMPLING[case]
    out = tmp_path / "out"
    model = (
        []
        if "--model_path" in argv and "{tmp}" in "".join(argv)
        else ["--model_path", str(run_dir / "model000004.pt")]
    )
    architecture = flags(**TINY) if not model else []  # nothing lies beside those in {tmp}
    argv = [word.replace("{tmp}", str(tmp_path)).replace("{run}", str(run_dir)) for word in argv]
    code, _, err = run(
        "super_res_sample",
        *model,
        *architecture,
        "--base_samples",
        small[0]["npz"],
        "--num_samples",
        "2",
        "--timestep_respacing",
        "2",
        "--out_dir",
        str(out),
        *argv,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and hint in err, err
    assert not out.exists() and not (tmp_path / "pwned").exists()


def test_image_sampling_refuses_a_super_resolution_model(trained, tmp_path, capsys, monkeypatch):
    bare = tmp_path / "bare.pt"
    bare.write_bytes((trained[0] / "model000004.pt").read_bytes())
    code, _, err = run(
        "image_sample",
        "--model_path",
        str(bare),
        "--image_size",
        "8",
        *flags(**NETWORK),
        "--num_samples",
        "2",
        "--out_dir",
        str(tmp_path / "out"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and "it is a super-resolution model" in err


def test_two_processes_train(large, tmp_path):
    """Odd numbers of pictures and ranks; one rank writes."""
    out = tmp_path / "two"
    done = launch.mpiexec(
        2,
        [
            str(ROOT / "scripts" / "super_res_train.py"),
            *flags(**TINY),
            "--data_dir",
            large,
            "--out_dir",
            str(out),
            "--max_steps",
            "2",
            "--batch_size",
            "2",
            "--ema_rate",
            "0.5",
            "--sample_interval",
            "2",
            "--sample_count",
            "5",
            "--sample_respacing",
            "2",
            "--log_interval",
            "1",
        ],
    )
    assert done.returncode == 0, done.stderr
    assert (out / "samples_000002.png").exists() and len(
        (out / "progress.csv").read_text().splitlines()
    ) == 3
    assert "2 processes" in done.stdout and "2 per process, 4 in all" in done.stdout
