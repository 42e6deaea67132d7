"""The whole way on real images in a few minutes: digits -> training with input perturbation -> samples, with and without
epsilon scaling, from the same noise -> Frechet distance (pixels), precision and recall of each.

    make demo          or, in an environment with the demo extra:   python scripts/demo.py

Each step is a command that you can run yourself; it is printed before it runs. Again after an interruption: what is done is
not done again.
"""
import json
import os
import subprocess
import sys

import numpy as np

from guided_diffusion_ip.config import command
from guided_diffusion_ip.data.image_io import save_grid, write_npz
from guided_diffusion_ip.evaluation.images import open_images

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
    """Measure the samples against the real digits, and name the pictures."""
    real = open_images(DIGITS, "digits")
    pixels = real.rows(0, real.n)
    save_grid(pixels[:: real.n // 64][:64], f"{RUN}/real.png")
    half = np.random.default_rng(0).permutation(real.n)
    parts = [f"{RUN}/real_half_{k}.npz" for k in (1, 2)]
    for part, index in zip(parts, (half[::2], half[1::2])):
        write_npz(part, {"arr_0": pixels[index]})
    rows = [("one half of the real digits", evaluate(parts[0], parts[1], f"{RUN}/evaluation_real.json"))]
    for lam, folder in folders.items():
        rows.append((f"samples, lambda = {lam}", evaluate(DIGITS, npz_in(folder), f"{folder}/evaluation.json")))
    print(f"\n{'against the real digits, on pixels':<38}{'Frechet distance':>18}{'precision':>12}{'recall':>10}{'images':>9}")
    for name, numbers in rows:
        values = "".join(f"{numbers[key]['value']:{width}.4f}" for key, width in (("fid", 18), ("prec", 12), ("recall", 10)))
        print(f"{name:<38}{values}{numbers['fid']['samples']:9d}")
    pictures = [("real.png", "real digits"), ("samples_*.png", "how they came about during training")]
    pictures[1:1] = [(os.path.relpath(f"{folder}/grid.png", RUN), f"samples, lambda = {lam}, from the same noise")
                     for lam, folder in folders.items()]
    print(f"\nPictures in {RUN}/:")
    for name, text in pictures:
        print(f"  {name:<42}{text}")


def evaluate(reference: str, samples: str, out: str) -> dict[str, dict]:
    """The numbers that evaluations/evaluator.py gives, from its JSON."""
    run("evaluations/evaluator.py", reference, samples, "--config", CONFIG, "--json", out)
    with open(out, encoding="utf-8") as file:
        return json.load(file)["metrics"]


def npz_in(folder: str) -> str:
    return next(os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".npz"))


if __name__ == "__main__":
    command(main)
