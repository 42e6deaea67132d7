"""The whole way on real images, in 25 minutes or so on two cores (by its parts): digits -> training
without (gamma = 0) and with input perturbation (gamma = 0.1) -> epsilon scaling calibrated for each
-> samples of both by DDIM in 10 steps, with and without it, from the same noise -> Frechet and
kernel distance (pixels), precision and recall of each -> the exposure bias of both -> a page that
shows it all.

    make demo          or, in an environment with the demo extra:   python scripts/demo.py

Each step is a command that you can run yourself; it is printed before it runs. Again after an
interruption: what is done is not done again.
"""

import json
import os
import subprocess
import sys

import numpy as np

from guided_diffusion_ip.data.image_io import save_grid
from guided_diffusion_ip.data.image_set import open_images
from guided_diffusion_ip.data.npz_io import write_npz
from guided_diffusion_ip.settings.config import command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIGITS, CONFIG = "datasets/digits", "configs/demo.yaml"
RUNS = {0.0: "runs/demo_baseline", 0.1: "runs/demo"}  # by gamma
STEPS = 1500
# Ways of sampling: a name for files, words for the table, where the chain starts, and whether
# lambda is calibrated.
WAYS = (
    ("plain", "lambda = 1", "", False),
    ("calibrated", "calibrated lambda", "", True),
    ("t_start", "lambda = 1, from t = 940", "940", False),
)
Row = tuple[str, dict[str, dict]]


def main() -> None:
    os.chdir(ROOT)
    run("datasets/digits.py", "--out", DIGITS)
    rows: list[Row] = [("one half of the real digits", halves(f"{RUNS[0.1]}/real"))]
    for gamma, folder in RUNS.items():
        train(gamma, folder)
        rows += [sampled(gamma, folder, *way) for way in WAYS]
        measure(folder)
    table(rows)
    title = "Digits, with and without remedies"
    run("scripts/report.py", *RUNS.values(), "--out", "runs/demo_report.html", "--title", title)


def train(gamma: float, folder: str) -> None:
    run(
        *("scripts/image_train.py", "--config", CONFIG, "--data_dir", DIGITS),
        *("--out_dir", folder, "--input_perturbation", str(gamma)),
        *("--max_steps", str(STEPS), "--resume", "auto"),
    )


def sampled(gamma: float, folder: str, name: str, words: str, start: str, calibrated: bool) -> Row:
    """500 samples in one of the ways, and their distances to the real digits."""
    checkpoint = ["--config", CONFIG, "--model_path", checkpoint_in(folder)]
    how = ["--t_start", start] if start else []
    out = f"{folder}/samples_{name}"
    if calibrated:
        schedule = f"{folder}/lambda_{name}.yaml"
        if not os.path.exists(schedule):
            run(
                *("scripts/calibrate_eps.py", *checkpoint, *how, "--data_dir", DIGITS),
                *("--features", "pixels", "--num_images", "1797", "--num_chains", "600"),
                *("--batch_size", "200", "--out", schedule),
            )
        how += ["--eps_schedule", schedule]
    run("scripts/image_sample.py", *checkpoint, *how, "--out_dir", out)
    return f"gamma = {gamma}, {words}", evaluate(DIGITS, npz_in(out), f"{out}/evaluation.json")


def measure(folder: str) -> None:
    run(
        *("scripts/exposure_bias.py", "--config", CONFIG, "--model_path", checkpoint_in(folder)),
        *("--data_dir", DIGITS, "--num_images", "200", "--batch_size", "100"),
        *("--measures", "norm,delta,variance,discretisation"),
        *("--out_dir", f"{folder}/exposure_bias"),
    )


def table(rows: list[Row]) -> None:
    columns = {"fid": 18, "kid": 12, "prec": 12, "recall": 10}
    print(
        f"\n{'against the real digits, on pixels':<46}{'Frechet distance':>18}{'kernel':>12}"
        f"{'precision':>12}{'recall':>10}{'images':>9}"
    )
    for name, numbers in rows:
        values = "".join(f"{numbers[key]['value']:{width}.4f}" for key, width in columns.items())
        print(f"{name:<46}{values}{numbers['fid']['samples']:9d}")


def checkpoint_in(folder: str) -> str:
    return f"{folder}/ema_0.995_{STEPS:06d}.pt"


def run(*args: str) -> None:
    """Run one of our scripts and stop the demo if it fails."""
    print("\n$ python " + " ".join(args), flush=True)
    code = subprocess.run([sys.executable, *args]).returncode
    if code:
        sys.exit(code)


def halves(folder: str) -> dict[str, dict]:
    """One half of the real digits against the other: as near as samples can come; a picture of
    some, too.
    """
    real = open_images(DIGITS, "digits")
    pixels = real.rows(0, real.n)
    save_grid(pixels[:: real.n // 64][:64], f"{folder}/grid.png")
    order = np.random.default_rng(0).permutation(real.n)
    parts = [f"{folder}/half_{k}.npz" for k in (1, 2)]
    for part, index in zip(parts, (order[::2], order[1::2])):
        write_npz(part, {"arr_0": pixels[index]})
    return evaluate(*parts, f"{folder}/evaluation.json")


def evaluate(reference: str, samples: str, out: str) -> dict[str, dict]:
    """The numbers that evaluations/evaluator.py gives, from its JSON."""
    run("evaluations/evaluator.py", reference, samples, "--config", CONFIG, "--json", out)
    with open(out, encoding="utf-8") as file:
        return json.load(file)["metrics"]


def npz_in(folder: str) -> str:
    return next(
        os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".npz")
    )


if __name__ == "__main__":
    command(main)
