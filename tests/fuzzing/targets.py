"""What is read from outside: for each kind a function that damages it in a folder of its own, and
the command that then reads it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import launch
import numpy as np
import torch
from PIL import Image

from guided_diffusion_ip.settings.flags import SCRIPTS

from .mutations import NUMBERS, WORDS, Rng, damaged, damaged_text, odd_npz, odd_state, pick
from .running import Case

MODEL = dict(
    image_size=8,
    in_channels=3,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    num_head_channels=32,
    class_cond=True,
    num_classes=3,
)


def words(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


class Base:
    """Whole files of every kind, made once; targets copy what they damage."""

    def __init__(self, place: Path) -> None:
        self.place = place
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
        self.arrays = {"arr_0": self.pixels, "arr_1": np.arange(9) % 3}
        np.savez(place / "images.npz", **self.arrays)
        np.savez(place / "reference.npz", **self.pixel_statistics(), arr_0=self.pixels)
        done = launch.run(
            [sys.executable, "scripts/image_train.py", *self.training(place / "run", 2)]
        )
        assert done.returncode == 0, done.stderr
        self.ema = place / "run" / "ema_0.9_000002.pt"
        loaded = torch.load(self.ema, weights_only=True)
        self.state = {name: value.contiguous() for name, value in loaded.items()}
        self.png = self._file("PNG")
        self.pictures = {kind: self._file(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF")}

    def _file(self, kind: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.pixels[0]).save(file, kind)
        return file.getvalue()

    def pixel_statistics(self) -> dict[str, np.ndarray]:
        rows = self.pixels.reshape(len(self.pixels), -1).astype(np.float64)
        return {
            "mu": rows.mean(0),
            "sigma": np.cov(rows, rowvar=False),
            "n": np.array([len(rows)], np.int64),
            "features": np.array("pixels"),
        }

    def training(self, out: Path, steps: int, **more: object) -> list[str]:
        return words(
            **MODEL,
            data_dir=self.place / "images.npz",
            out_dir=out,
            max_steps=steps,
            batch_size=2,
            ema_rate=0.9,
            num_workers=0,
            **more,
        )


Target = Callable[[Base, Path, Rng], Case]
TRAINED = ("out/*.pt", "out/config.yaml")
SAMPLED = ("out/samples_*.npz", "out/grid.png")


def flags_of(base: Base, folder: Path, rng: Rng) -> Case:
    """Any script, with a few flags of any value."""
    scripts = {  # other tests may have declared more
        path.stem: f"{home}/{path.name}"
        for home in ("scripts", "evaluations")
        for path in (launch.ROOT / home).glob("*.py")
        if path.stem in SCRIPTS and path.stem != "sweep"
    }
    name = pick(rng, sorted(scripts))
    script = scripts[name]
    given = {"out_dir": "out", "data_dir": base.place / "images.npz"}
    given |= {"model_path": base.ema, "max_steps": 1, "num_samples": 2, "timestep_respacing": 2}
    given |= {"num_images": 4, "batch_size": 2, "iterations": 1, "num_workers": 0}
    given |= {"large_size": 16, "small_size": 8}  # by default 256: right, and long
    given |= {"out": "out/made.npz", "data": base.place / "images.npz", "source": base.ema}
    given |= {"ref": base.place / "reference.npz", "samples": base.place / "images.npz"}
    given |= {"baseline": base.place / "images.npz", "features": "pixels", "num_chains": 20}
    own = {flag.name: flag for flag in SCRIPTS[name].flags()}
    chosen = {key: str(value) for key, value in given.items() if key in own}
    if name.endswith("_train"):
        chosen |= {key: str(value) for key, value in MODEL.items() if key in own}
    for _ in range(int(rng.integers(1, 4))):
        flag = own[pick(rng, sorted(own))]
        choices = [str(c) for c in flag.allowed] if rng.random() < 0.4 else []
        chosen[flag.name] = pick(rng, choices or (NUMBERS if rng.random() < 0.6 else WORDS))
        if not choices and rng.random() < 0.6:
            chosen[flag.name] = _fitting(rng, flag.default)
    for name_of_long in (
        "max_steps",
        "iterations",
        "num_samples",
        "timestep_respacing",
        "edm_steps",
    ):
        value = chosen.get(name_of_long, "")
        if value.replace("_", "").isdigit() and 8 < int(value) <= 10**8:
            chosen[name_of_long] = "3"  # right, and long
    return Case("flags", script, [w for pair in chosen.items() for w in (f"--{pair[0]}", pair[1])])


def _fitting(rng: Rng, default: object) -> str:
    """A value of the flag's own kind."""
    if isinstance(default, bool):
        return pick(rng, ("True", "False"))
    if isinstance(default, int):
        return str(pick(rng, (0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 1000, -1, 10**5)))
    if isinstance(default, float):
        return str(pick(rng, (0, 1, 0.5, 0.1, 1e-3, 1e-8, 2, 10, 100, 1.5, -1)))
    return pick(rng, WORDS)


def config(base: Base, folder: Path, rng: Rng) -> Case:
    text = (base.place / "run" / "config.yaml").read_text()
    (folder / "c.yaml").write_bytes(damaged_text(rng, text))
    argv = ["--config", "c.yaml", *base.training(Path("out"), 1)]
    return Case("config of a training", "scripts/image_train.py", argv, TRAINED)


def config_beside(base: Base, folder: Path, rng: Rng) -> Case:
    shutil.copytree(base.place / "run", folder / "run")
    path = folder / "run" / "config.yaml"
    path.write_bytes(damaged_text(rng, path.read_text()))
    return _sampling("config beside a checkpoint", folder / "run" / base.ema.name)


def _sampling(target: str, checkpoint: Path, **more: object) -> Case:
    argv = words(model_path=checkpoint, num_samples=2, timestep_respacing=2, out_dir="out", **more)
    return Case(target, "scripts/image_sample.py", argv, SAMPLED)


def schedule(base: Base, folder: Path, rng: Rng) -> Case:
    text = pick(
        rng,
        (
            "b: 1.01\n",
            "lambda: [1.0, 1.01]\nuse: lambda\nsettings:\n  solver: ddpm\n  seed: 0\n",
            "k: 0.001\nb: 1.0\nuse: kb\nsettings: {timestep_respacing: '2', eta: 0}\n",
        ),
    )
    (folder / "eps.yaml").write_bytes(damaged_text(rng, text))
    return _sampling("lambda schedule", base.ema, eps_schedule="eps.yaml")


def settings(base: Base, folder: Path, rng: Rng) -> Case:
    (folder / "out").mkdir()
    text = "seed: 0\nnum_samples: 2\ncheckpoint: abc\nlambda: [1.0, 1.0]\nsolver: ddpm\n"
    (folder / "out" / "settings.yaml").write_bytes(damaged_text(rng, text))
    return _sampling("settings.yaml of samples", base.ema)


def checkpoint(base: Base, folder: Path, rng: Rng) -> Case:
    path = folder / "x.pt"
    if rng.random() < 0.35:
        path.write_bytes(damaged(rng, base.ema.read_bytes()))
    else:
        torch.save(odd_state(rng, base.state), path)
    more = {name: value for name, value in MODEL.items() if rng.random() < 0.9}
    return _sampling("checkpoint", path, **more)


def run_folder(base: Base, folder: Path, rng: Rng) -> Case:
    shutil.copytree(base.place / "run", folder / "out")
    name = pick(rng, sorted(p.name for p in (folder / "out").iterdir() if p.is_file()))
    path = folder / "out" / name
    content = path.read_bytes()
    is_text = name.endswith((".yaml", ".csv", ".json", ".txt"))
    path.write_bytes(
        damaged_text(rng, content.decode(), name.endswith(".yaml"))
        if is_text
        else damaged(rng, content)
    )
    argv = base.training(Path("out"), 3, resume="auto")
    return Case("a run to be continued", "scripts/image_train.py", argv, ("out/*000003.pt",))


def image_npz(base: Base, folder: Path, rng: Rng) -> Case:
    (folder / "x.npz").write_bytes(_npz(rng, base.arrays, base.place / "images.npz"))
    return _read_images("npz of images", folder / "x.npz", base, rng)


def _npz(rng: Rng, arrays: dict[str, np.ndarray], whole: Path) -> bytes:
    return damaged(rng, whole.read_bytes()) if rng.random() < 0.3 else odd_npz(rng, arrays)


def _read_images(target: str, data: Path, base: Base, rng: Rng) -> Case:
    kind = int(rng.integers(4))
    if kind == 0:
        argv = base.training(Path("out"), 1)
        argv[argv.index("--data_dir") + 1] = str(data)
        if rng.random() < 0.5:
            argv += words(class_cond=False)
        return Case(target, "scripts/image_train.py", argv, TRAINED)
    if kind == 1:
        argv = [str(data), *words(out="made.npz", image_size=8)]
        return Case(target, "scripts/npz_to_png.py", argv, ("made.npz", "made.npz/*"))
    if kind == 2:
        argv = [str(data), *words(out="made.npz", features="pixels", keep_images=4)]
        return Case(target, "evaluations/make_reference.py", argv, ("made.npz",))
    argv = [str(data), str(base.place / "images.npz")]
    argv = argv if rng.random() < 0.5 else argv[::-1]
    argv += words(features="pixels", metrics=pick(rng, ("fid", "kid", "prec,recall", "fid,kid")))
    return Case(target, "evaluations/evaluator.py", [*argv, "--json", "made.json"], ("made.json",))


def reference(base: Base, folder: Path, rng: Rng) -> Case:
    arrays = base.pixel_statistics() | ({"arr_0": base.pixels} if rng.random() < 0.5 else {})
    if rng.random() < 0.3:
        arrays["n"] = np.array(pick(rng, (np.inf, np.nan, -3, 0, 1e30, True, "x")))
    if rng.random() < 0.2:
        arrays["features"] = np.array(pick(rng, ("", "  ", "inception", "x" * 999)))
    if rng.random() < 0.2:
        arrays["sigma"] = arrays["sigma"] * pick(rng, (np.nan, np.inf, -1.0, 1e300))
    (folder / "x.npz").write_bytes(_npz(rng, arrays, base.place / "reference.npz"))
    argv = ["x.npz", str(base.place / "images.npz"), *words(features="pixels", json="made.json")]
    return Case("reference", "evaluations/evaluator.py", argv, ("made.json",))


NAMES = (
    *("a_1.png", "b/1.png", "b/2.jpg", "c/.x.png", "c/1.tif", "d e/1.gif", "é_1.bmp", "1.webp"),
    *("b/b/b/1.png", "x.png/1.png", "a\n_1.png", "a\x1b[31m_1.png", "z" * 200 + "_1.png", "_1.png"),
    *("caf\udce9_1.png", "caf\udce9/1.png", "-_1.png", "~/1.png", "a_1.PNG", "b/1.pn"),
)


def image_folder(base: Base, folder: Path, rng: Rng) -> Case:
    data = folder / "d"
    for _ in range(int(rng.integers(1, 5))):
        path = data / pick(rng, NAMES)
        if path.exists() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = int(rng.integers(12))
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            os.symlink(pick(rng, (".", "..", "/dev/zero", "nowhere", path.name)), path)
        elif kind == 2:
            path.mkdir()
        elif kind == 3:
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n")
        else:
            content = pick(rng, base.pictures.values())
            path.write_bytes(damaged(rng, content) if kind < 9 else content)
    data.mkdir(exist_ok=True)
    return _read_images("folder of images", data, base, rng)


def image_zip(base: Base, folder: Path, rng: Rng) -> Case:
    file = io.BytesIO()
    with zipfile.ZipFile(
        file, "w", pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as packed:
        for _ in range(int(rng.integers(1, 5))):
            name = pick(rng, (*NAMES, "../../x.png", "/etc/x.png", "preprocessing.txt"))
            content = pick(rng, base.pictures.values())
            if rng.random() < 0.02:
                content = bytes(300 << 20)
            packed.writestr(
                name.encode("utf-8", "replace").decode(),
                damaged(rng, content) if rng.random() < 0.5 else content,
            )
    data = file.getvalue()
    (folder / "x.zip").write_bytes(damaged(rng, data) if rng.random() < 0.5 else data)
    return _read_images("zip of images", folder / "x.zip", base, rng)


def sweep(base: Base, folder: Path, rng: Rng) -> Case:
    text = (
        f"checkpoints:\n  a: {base.ema}\nreference: {base.place / 'reference.npz'}\n"
        "features: pixels\nmetrics: [kid]\nnum_samples: 4\nsampler: [ddim, ddpm]\nsteps: [2, 3]\n"
        "eta: 0\nlambda: [1.0, {ES: {2: 1.01, 3: 1.0}}]\nseeds: [0, 1]\n"
        "exclude:\n  - {sampler: ddim, lambda: ES}\nsample: {batch_size: 4}\n"
    )
    (folder / "s.yaml").write_bytes(damaged_text(rng, text))
    # Cells are programs of their own: this launcher fails, so that a right sweep ends at once.
    argv = ["s.yaml", *words(out_dir="out", launcher="/bin/false")]
    return Case("sweep", "scripts/sweep.py", argv, ("out/table.*",), codes=(0, 1, 2))


def report(base: Base, folder: Path, rng: Rng) -> Case:
    shutil.copytree(base.place / "run", folder / "d" / "run")
    for name, content in {
        "cells.json": json.dumps({"cells": []}),
        "measures.json": json.dumps(
            {"measures": {"norm": {"ratio": [1.0, 1.1]}}, "num_timesteps": 2, "lambda": [1.0, 1.0]}
        ),
        "eps.yaml": "lambda: [1.0, 1.01, 1.02]\nsettings: {a: 1}\n",
        "settings.yaml": "seed: 0\nnum_samples: 4\n",
        "evaluation.json": json.dumps({"metrics": {"fid": {"value": 1.5, "samples": 4}}}),
    }.items():
        home = folder / "d" / pick(rng, ("run", "other", "more"))
        home.mkdir(exist_ok=True)
        (home / name).write_text(content)
    (folder / "d" / "other").mkdir(exist_ok=True)
    (folder / "d" / "other" / "grid.png").write_bytes(base.png)
    files = sorted(p for p in (folder / "d").rglob("*") if p.suffix in (".csv", ".json", ".yaml"))
    for _ in range(int(rng.integers(1, 3))):
        path = pick(rng, files)
        path.write_bytes(
            damaged_text(rng, path.read_text(errors="replace"), path.suffix == ".yaml")
        )
    return Case("report", "scripts/report.py", ["d", "--out", "made.html"], ("made.html",))


def converted(base: Base, folder: Path, rng: Rng) -> Case:
    kind = int(rng.integers(3))
    if kind == 0:
        (folder / "x.pkl").write_bytes(
            damaged(rng, pickle.dumps({"ema": {"a": np.zeros(3)}, "n": 1}, protocol=2))
        )
        source = "x.pkl"
    elif kind == 1:
        torch.save(odd_state(rng, base.state), folder / "x.pt")
        source = "x.pt"
    else:
        from safetensors.torch import save_file

        save_file(base.state, folder / "x.safetensors", {"config": "model: {image_size: 8}"})
        content = (folder / "x.safetensors").read_bytes()
        (folder / "x.safetensors").write_bytes(damaged(rng, content[:3000]) + content[3000:])
        source = "x.safetensors"
        if rng.random() < 0.5:
            return _sampling("safetensors", folder / source, **MODEL)
    target = pick(rng, ("made", "made.safetensors", "made.pt"))
    argv = [source, target, *words(image_size=8)] if rng.random() < 0.5 else [source, target]
    return Case("conversion", "scripts/convert_checkpoint.py", argv, ("made*", "made/*"))


def published_set(base: Base, folder: Path, rng: Rng) -> Case:
    name = pick(rng, ("cifar10", "imagenet32", "celeba64", "ffhq128", "lsun_tower"))
    source = folder / "s"
    source.mkdir()
    finals = ("out/train.npz", "out/reference.npz", "out/train/*")
    if name == "cifar10":
        rows = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        for k in range(1, 6):
            (source / f"data_batch_{k}.bin").write_bytes(rows.tobytes())
    elif name == "imagenet32":
        for k in range(1, 3):
            data = rng.integers(0, 256, (int(rng.integers(0, 3)), 3072), dtype=np.uint8)
            batch = {"data": data, "labels": [1] * len(data)}
            if rng.random() < 0.5:
                np.savez(source / f"train_data_batch_{k}.npz", **batch)
            else:
                (source / f"train_data_batch_{k}").write_bytes(pickle.dumps(batch, protocol=2))
    elif name == "lsun_tower":
        import lmdb

        with lmdb.open(str(source), map_size=1 << 20) as env, env.begin(write=True) as transaction:
            for k in range(20):
                transaction.put(b"%d" % k, base.png)
        if rng.random() < 0.7:
            content = (source / "data.mdb").read_bytes()
            (source / "data.mdb").write_bytes(content[: int(rng.integers(len(content)))])
        return _prepared(name, "s", finals)
    else:
        size = (178, 218) if name == "celeba64" else (128, 128)
        for k in range(2):
            file = io.BytesIO()
            Image.new("RGB", size, (k, 9, 9)).save(file, "JPEG" if name == "celeba64" else "PNG")
            ending = "jpg" if name == "celeba64" else "png"
            (source / f"{k:06d}.{ending}").write_bytes(file.getvalue())
    path = pick(rng, sorted(source.iterdir()))
    if rng.random() < 0.8:
        path.write_bytes(damaged(rng, path.read_bytes()))
    if name in ("cifar10", "imagenet32") and rng.random() < 0.4:
        packed = folder / "s.tar.gz"
        with tarfile.open(packed, "w:gz") as tar:
            tar.add(source, "inside")
        if rng.random() < 0.5:
            packed.write_bytes(damaged(rng, packed.read_bytes()))
        return _prepared(name, "s.tar.gz", finals)
    return _prepared(name, "s", finals)


def _prepared(name: str, source: str, finals: tuple[str, ...]) -> Case:
    argv = ["--source", source, "--out", "out", "--allow_partial"]
    return Case(f"data set {name}", f"datasets/{name}.py", argv, finals)


def features(base: Base, folder: Path, rng: Rng) -> Case:
    """A feature network that is damaged, or something else."""
    name = pick(rng, ("x.onnx", "x.pth", "x.pb"))
    (folder / name).write_bytes(damaged(rng, base.ema.read_bytes()[:20_000]))
    images = str(base.place / "images.npz")
    how = (
        words(features=name)
        if name == "x.onnx"
        else words(features="inception", inception_weights=name)
    )
    argv = [images, images, *how, "--json", "made.json"]
    return Case("feature network", "evaluations/evaluator.py", argv, ("made.json",))


TARGETS: dict[str, tuple[Target, float]] = {  # and how often
    "flags": (flags_of, 4.0),
    "config": (config, 1.0),
    "config_beside": (config_beside, 1.0),
    "schedule": (schedule, 1.0),
    "settings": (settings, 1.0),
    "checkpoint": (checkpoint, 2.0),
    "run_folder": (run_folder, 1.0),
    "image_npz": (image_npz, 2.0),
    "reference": (reference, 1.5),
    "image_folder": (image_folder, 2.0),
    "image_zip": (image_zip, 1.5),
    "sweep": (sweep, 1.5),
    "report": (report, 1.0),
    "converted": (converted, 1.0),
    "published_set": (published_set, 1.5),
    "features": (features, 0.5),
}


def case_of(base: Base, folder: Path, seed: int) -> Case:
    """The input of that number; the same number makes the same input."""
    rng = np.random.default_rng([20261126, seed])
    names = list(TARGETS)
    weights = np.array([TARGETS[name][1] for name in names])
    name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    return TARGETS[name][0](base, folder, rng)
