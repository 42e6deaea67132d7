"""The whole way on real images in a few minutes: digits -> training with input perturbation -> samples, with and without
epsilon scaling, from the same noise -> a number for each.

    make demo          or, in an environment with the demo extra:   python scripts/demo.py

Each step is a command that you can run yourself; it is printed before it runs. Again after an interruption: what is done is
not done again.
"""
import os
import subprocess
import sys

import numpy as np
from PIL import Image

from guided_diffusion_ip.config import command
from guided_diffusion_ip.data.image_io import save_grid
from guided_diffusion_ip.data.npz_io import NpzReader
from guided_diffusion_ip.metrics.frechet import frechet_distance

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIGITS, RUN, CONFIG = "datasets/digits", "runs/demo", "configs/demo.yaml"
STEPS, LAMBDA = 1500, 1.02
CHECKPOINT = f"{RUN}/ema_0.995_{STEPS:06d}.pt"


def main() -> None:
    os.chdir(ROOT)
    run("datasets/digits.py", "--out", DIGITS)
    if not os.path.exists(CHECKPOINT):
        run("scripts/image_train.py", "--config", CONFIG, "--data_dir", DIGITS, "--out_dir", RUN, "--max_steps", str(STEPS))
    folders = {}
    for lam in (1.0, LAMBDA):
        folders[lam] = f"{RUN}/samples_lambda_{lam}"
        run("scripts/image_sample.py", "--config", CONFIG, "--model_path", CHECKPOINT, "--eps_scaler", str(lam),
            "--out_dir", folders[lam])
    report(folders)


def run(*args: str) -> None:
    """Run one of our scripts and stop the demo if it fails."""
    print("\n$ python " + " ".join(args), flush=True)
    code = subprocess.run([sys.executable, *args]).returncode
    if code:
        sys.exit(code)


def report(folders: dict[float, str]) -> None:
    """Name the pictures, and measure the samples against the real digits."""
    real = read_digits(DIGITS)
    save_grid(real[:: len(real) // 64][:64, ..., None], f"{RUN}/real.png")
    half = np.random.default_rng(0).permutation(len(real))
    rows = [("one half of the real digits to the other", distance(real[half[::2]], real[half[1::2]]))]
    for lam, folder in folders.items():
        with NpzReader(npz_in(folder)) as reader:
            samples = reader.rows("arr_0", 0, reader.shape("arr_0")[0])[..., 0]
        rows.append((f"{len(samples)} samples, lambda = {lam}", distance(samples, real)))
    pictures = [("real.png", "real digits"), ("samples_*.png", "how they came about during training")]
    pictures[1:1] = [(os.path.relpath(f"{folder}/grid.png", RUN), f"samples, lambda = {lam}, from the same noise")
                     for lam, folder in folders.items()]
    print("\nFrechet distance to the real digits, on pixels (lower is better):")
    for name, value in rows:
        print(f"  {name:<42}{value:.4f}")
    print(f"\nPictures in {RUN}/:")
    for name, text in pictures:
        print(f"  {name:<42}{text}")


def read_digits(folder: str) -> np.ndarray:
    """All images of the class folders, uint8 [N, 16, 16]."""
    paths = sorted(os.path.join(f, name) for f, _, names in os.walk(folder) for name in names if name.endswith(".png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def npz_in(folder: str) -> str:
    return next(os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".npz"))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between two sets of images, their pixels in [0, 1] as features."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (a, b))
    return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


if __name__ == "__main__":
    command(main)
