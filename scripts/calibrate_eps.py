"""Find lambda(t) of epsilon scaling for a checkpoint, a sampler and a number of steps, without
samples and without FID.

    python scripts/calibrate_eps.py --model_path runs/NAME/ema_0.9999_100000.pt --data_dir DIR \\
        --num_images 1000 --timestep_respacing 20 --out eps20.yaml
    python scripts/image_sample.py --model_path ... --timestep_respacing 20 \\
        --eps_schedule eps20.yaml

Step by step from the noisy end, lambda(t) is chosen such that the norm of epsilon at t - 1 (or,
--by variance, the variance of x_{t-1}) is in the chain what it is on training inputs. The YAML also
has a constant b and a line k t + b fitted to it; `use:` in it says which of them samplers take.
What is found makes up for the sampler's own discretisation error too: it belongs to this sampler
and this number of steps (docs/exposure_bias.md). Chains are kept in memory, shared over processes.
"""

import os

import numpy as np

from guided_diffusion_ip import dist_util, files
from guided_diffusion_ip.exposure_bias.calibrate import (
    BRACKET,
    CLIPPED,
    EDGE,
    NOISE,
    SOLVED,
    Calibration,
    calibrate,
    describe,
)
from guided_diffusion_ip.settings.config import command, parse
from guided_diffusion_ip.settings.lambda_file import write_schedule
from guided_diffusion_ip.settings.make_sampler import make_sampler
from guided_diffusion_ip.settings.measuring import open_real_images, what_decides
from guided_diffusion_ip.settings.models import load_model_and_diffusion
from guided_diffusion_ip.settings.sampling import complete_settings
from guided_diffusion_ip.sizes import parse_size

COMMENT = (
    "lambda(t) for --eps_schedule, from scripts/calibrate_eps.py. Index 0 = last, clean step. "
    "`use`: lambda, b, or kb.\nIt contains the discretisation error of this sampler at this number "
    "of steps: calibrate again for another."
)


def main() -> None:
    cfg = complete_settings(parse("calibrate_eps", __doc__))
    dist_util.setup_dist()
    model, diffusion = load_model_and_diffusion(cfg)
    size = parse_size(cfg.image_size)
    sampler, real = make_sampler(cfg, diffusion, size), open_real_images(cfg, size)
    kind = sampler.solver + "".join(f"{value:g}" for value in sampler.options.values())
    out = cfg.out or os.path.join(
        files.folder_beside(cfg.model_path), f"eps_schedule-{kind}-{sampler.num_steps}.yaml"
    )
    if files.is_remote(out) or os.path.isdir(out):
        raise ValueError(
            f"--out {out}: give the name of a file of this machine, such as eps_schedule.yaml"
        )
    settings = {"by": cfg.by, **what_decides(cfg, real)}
    for note in cfg.notes_on_origin():
        dist_util.say(note)
    dist_util.say(
        f"images: {len(real)} spread over {real.text}\n"
        f"calibrating {kind} at {sampler.num_steps} steps with {cfg.model_path}, by {cfg.by}"
    )
    found = calibrate(sampler, model, real, len(real), cfg.batch_size, dist_util.dev(), cfg.by)
    dist_util.say(table(found))
    require_some_solved(found, out)
    if dist_util.is_main():
        write_schedule(out, describe(found, settings), COMMENT)
        print(f"schedule: {out}", flush=True)
    dist_util.cleanup()


def require_some_solved(found: Calibration, out: str) -> None:
    """Warn of lambdas that are but the bracket's end.

    Raises:
        ValueError: the target was met at no step.
    """
    tried = len(found.how) - 1  # the last step is never looked at
    edge, noise, clipped = (found.how.count(how) for how in (EDGE, NOISE, CLIPPED))
    low, high = BRACKET
    if SOLVED not in found.how:
        raise ValueError(
            f"nothing was solved, and {out} is not written: of {tried} steps {edge} need a lambda "
            f"outside of {low} to {high}, {noise} show no response above the noise (more "
            f"--num_images help) and at {clipped} x_0_hat is clipped; is it the checkpoint's own "
            "data, and enough steps?"
        )
    if edge:
        dist_util.say(
            f"warning: {edge} of {tried} lambdas are at the edge of {low} to {high}, where they do "
            "not meet the target: the chain's norm (or variance) is off by more than lambda can "
            "make up for; compare FIDs before using them"
        )


def table(found: Calibration) -> str:
    """A line per step, noisy end first, and the fits."""
    lines = ["   t    lambda     error  how"]
    for t in range(len(found.lambdas) - 1, -1, -1):
        error = f"{found.error[t]:.4f}" if np.isfinite(found.error[t]) else "-"
        lines.append(f"{t:4d}  {found.lambdas[t]:.5f}  {error:>8}  {found.how[t]}")
    fit = found.fit()
    return "\n".join(
        [
            *lines,
            f"uniform b = {fit['b']:.5f}; line k = {fit['line_k']:.6f}, b = {fit['line_b']:.5f}",
        ]
    )


if __name__ == "__main__":
    command(main)
