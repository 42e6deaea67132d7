"""The whole way on real images in a quarter of an hour: digits -> training without (gamma = 0) and
with input perturbation (gamma = 0.1) -> samples of both, with and without epsilon scaling, from the
same noise -> Frechet distance (pixels), precision and recall of each -> the exposure bias of both
-> a page that shows it all.

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
STEPS, LAMBDA = 1500, 1.02


def main() -> None:
    os.chdir(ROOT)
    run("datasets/digits.py", "--out", DIGITS)
    rows = [("one half of the real digits", halves(f"{RUNS[0.1]}/real"))]
    for gamma, folder in RUNS.items():
        checkpoint = f"{folder}/ema_0.995_{STEPS:06d}.pt"
        run(
            "scripts/image_train.py",
            "--config",
            CONFIG,
            "--data_dir",
            DIGITS,
            "--out_dir",
            folder,
            "--input_perturbation",
            str(gamma),
            "--max_steps",
            str(STEPS),
            "--resume",
            "auto",
        )
        for lam in (1.0, LAMBDA):
            out = f"{folder}/samples_lambda_{lam}"
            run(
                "scripts/image_sample.py",
                "--config",
                CONFIG,
                "--model_path",
                checkpoint,
                "--eps_scaler",
                str(lam),
                "--out_dir",
                out,
            )
            rows.append(
                (
                    f"gamma = {gamma}, lambda = {lam}",
                    evaluate(DIGITS, npz_in(out), f"{out}/evaluation.json"),
                )
            )
        run(
            "scripts/exposure_bias.py",
            "--config",
            CONFIG,
            "--model_path",
            checkpoint,
            "--data_dir",
            DIGITS,
            "--measures",
            "norm,delta,variance",
            "--num_images",
            "200",
            "--batch_size",
            "100",
            "--timestep_respacing",
            "20",
            "--out_dir",
            f"{folder}/exposure_bias",
        )
    print(
        f"\n{'against the real digits, on pixels':<38}{'Frechet distance':>18}{'precision':>12}"
        f"{'recall':>10}{'images':>9}"
    )
    for name, numbers in rows:
        values = "".join(
            f"{numbers[key]['value']:{width}.4f}"
            for key, width in (("fid", 18), ("prec", 12), ("recall", 10))
        )
        print(f"{name:<38}{values}{numbers['fid']['samples']:9d}")
    run(
        "scripts/report.py",
        *RUNS.values(),
        "--out",
        "runs/demo_report.html",
        "--title",
        "Digits, with and without remedies",
    )


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
