"""The table of docs/solvers.md: how far samples of Gaussian data are off, by solver and steps.

    python tools/solver_errors.py

With an exact network every difference is the solver's own: printed is the relative error of the
standard deviation of finished samples, in per cent. The data have the standard deviation 0.5.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from guided_diffusion_ip.diffusion.solvers import SOLVERS
from guided_diffusion_ip.diffusion.solvers.loop import last_of, run
from guided_diffusion_ip.diffusion.solvers.paths import AlongProcess
from guided_diffusion_ip.script_util import create_gaussian_diffusion

STD, SCHEDULE, STEPS = 0.5, "cosine", (10, 20, 50)


def main() -> None:
    plain = SOLVERS["dpmpp_2m"]

    def unlimited(*args, **kwargs):
        return plain.step(*args, **kwargs, limit=math.inf)

    rows = {
        "ddim": SOLVERS["ddim"],
        "DPM-Solver++(2M) without the limit": replace(plain, step=unlimited),
        "dpmpp_2m": plain,
    }
    print("| steps |" + "".join(f" {n} |" for n in STEPS))
    for name, solver in rows.items():
        print(f"| {name} |" + "".join(f" {100 * error(solver, n):.2f} |" for n in STEPS))


def error(solver, steps: int) -> float:
    whole = create_gaussian_diffusion(noise_schedule=SCHEDULE).alphas_cumprod
    process = create_gaussian_diffusion(noise_schedule=SCHEDULE, timestep_respacing=str(steps))
    alpha_bar = torch.from_numpy(whole).float()

    def exact(x: Tensor, t: Tensor) -> Tensor:
        ab = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() / (ab * STD**2 + 1 - ab) * x

    path = AlongProcess(process, clip_denoised=False).bind(exact, {})
    noise = torch.ones(1, 1, 1, 1)  # everything is linear: one number tells
    end = float(last_of(run(solver, path, noise)).x)
    ab = process.alphas_cumprod[-1]
    return end / (STD / math.sqrt(ab * STD**2 + 1 - ab)) - 1


if __name__ == "__main__":
    main()
