"""Find lambda(t) of epsilon scaling for a checkpoint, a sampler and a number of steps, without FID.

    python scripts/calibrate_eps.py --model_path runs/NAME/ema_0.9999_100000.pt --data_dir DIR \\
        --num_images 5000 --num_chains 500 --timestep_respacing 20 --out eps20.yaml
    python scripts/image_sample.py --model_path ... --timestep_respacing 20 \\
        --eps_schedule eps20.yaml

The same chains are drawn with several lambdas; the lowest point of the distance between finished
and real images is the answer, if it pays on chains with other noise too, and lambda = 1 otherwise.
The distance is taken in --features, which should be those by which the samples will be judged.
--by chooses the distance, or another rule; --form lets lambda depend on t. The YAML says what was
found, its errors, what it is worth and what it cost; a picture of the curve lies beside it. What is
found makes up for the sampler's own errors too: it belongs to this sampler and this number of steps
(docs/exposure_bias.md). Processes share the chains; the same command again continues an interrupted
search.
"""

import hashlib
import json
import os
from typing import Any

import torch

from guided_diffusion_ip import dist_util, files
from guided_diffusion_ip.data.image_set import ImageSet
from guided_diffusion_ip.evaluation.opening import FeatureChoice
from guided_diffusion_ip.exposure_bias import plots
from guided_diffusion_ip.exposure_bias.calibrate import RULES, calibrate
from guided_diffusion_ip.exposure_bias.calibration_picture import picture
from guided_diffusion_ip.exposure_bias.chains import TrialStore, in_space, pixels
from guided_diffusion_ip.exposure_bias.common_noise import CommonNoise
from guided_diffusion_ip.exposure_bias.greedy import StepByStep
from guided_diffusion_ip.ownership import owning
from guided_diffusion_ip.runs.sample_batch import Sampler
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.lambda_file import write_schedule
from guided_diffusion_ip.settings.make_sampler import make_sampler
from guided_diffusion_ip.settings.measuring import open_real_images, what_decides
from guided_diffusion_ip.settings.models import load_model_and_diffusion
from guided_diffusion_ip.settings.sampling import complete_settings
from guided_diffusion_ip.sizes import parse_size

COMMENT = (
    "lambda(t) for --eps_schedule, from scripts/calibrate_eps.py. Index 0 = last, clean step. "
    "`use`: lambda, b, or kb.\nIt makes up for errors of this sampler at this number of steps: "
    "calibrate again for another."
)


def main() -> None:
    cfg = complete_settings(parse("calibrate_eps", __doc__))
    refuse_options_of_other_rules(cfg)
    if cfg.plots and "form" in RULES[cfg.by].options:
        plots.require_matplotlib()
    dist_util.setup_dist()
    model, diffusion = load_model_and_diffusion(cfg)
    size = parse_size(cfg.image_size)
    sampler, real = make_sampler(cfg, diffusion, size), open_real_images(cfg, size)
    kind = sampler.solver + "".join(f"{value:g}" for value in sampler.options.values())
    out = place_of_result(cfg, sampler, kind)
    settings = {"by": cfg.by, **what_decides(cfg, real)}
    for note in cfg.notes_on_origin():
        dist_util.say(note)
    dist_util.say(
        f"images: {len(real)} spread over {real.text}\n"
        f"calibrating {kind} at {sampler.num_steps} steps with {cfg.model_path}, by {cfg.by}: "
        f"{RULES[cfg.by].worth}"
    )
    options = options_of_rule(cfg, out, settings, real.of_all)
    folder, name = os.path.split(os.path.abspath(out))
    with owning(folder, f".{name}.lock", "give another --out"):
        search(cfg, out, settings, sampler, model, real, options)
    dist_util.cleanup()


def search(
    cfg: Config,
    out: str,
    settings: dict[str, Any],
    sampler: Sampler,
    model: torch.nn.Module,
    real: ImageSet,
    options: dict[str, Any],
) -> None:
    """Calibrate, write the YAML and draw."""
    found = calibrate(
        sampler, model, real, len(real), cfg.batch_size, dist_util.dev(), cfg.by, **options
    )
    dist_util.say(found.table())
    if isinstance(found, StepByStep):
        for warning in found.check(out):
            dist_util.say(warning)
    if dist_util.is_main():
        write_schedule(out, {**found.content(), "settings": settings}, COMMENT)
        print(f"schedule: {out}", flush=True)
        if cfg.plots and isinstance(found, CommonNoise):
            folder, name = os.path.split(os.path.splitext(out)[0])
            for path in plots.save_picture(picture(found, name), folder):
                print(f"picture: {path}", flush=True)
    if "store" in options:
        options["store"].remove()


def refuse_options_of_other_rules(cfg: Config) -> None:
    """Raises ValueError where a flag was given that this rule does not read."""
    for name in ("num_chains", "form", "groups", "features"):
        if cfg.on_command_line(name) and name not in RULES[cfg.by].options:
            owners = [rule for rule, entry in RULES.items() if name in entry.options]
            raise ValueError(
                f"--{name} {cfg.values[name]} means nothing for --by {cfg.by}: it is for "
                f"{', '.join(owners)}; leave it out"
            )
    if cfg.feature_size and cfg.features == "pixels":
        raise ValueError(
            f"--feature_size {cfg.feature_size} is for --features other than pixels: leave it out"
        )
    if cfg.on_command_line("groups") and cfg.form != "groups":
        raise ValueError(f"--groups {cfg.groups} is for --form groups: add that, or leave it out")


def place_of_result(cfg: Config, sampler: Sampler, kind: str) -> str:
    """The YAML to write.

    Raises:
        ValueError: a folder, or a place that is not on this machine.
    """
    out = cfg.out or os.path.join(
        files.folder_beside(cfg.model_path), f"eps_schedule-{kind}-{sampler.num_steps}.yaml"
    )
    if files.is_remote(out) or os.path.isdir(out):
        raise ValueError(
            f"--out {out}: give the name of a file of this machine, such as eps_schedule.yaml"
        )
    return out


def options_of_rule(cfg: Config, out: str, settings: dict[str, Any], of_all: int) -> dict[str, Any]:
    """The keyword arguments of the rule, from the flags; the images are some of so many."""
    features = pixels
    if "features" in RULES[cfg.by].options and cfg.features != "pixels":
        choice = FeatureChoice(cfg.features, inception_weights=cfg.inception_weights)
        size = parse_size(cfg.feature_size) if cfg.feature_size else None
        features = in_space(choice.open(dist_util.dev(), dist_util.say), size)
    elif cfg.in_channels == 3:
        dist_util.say(
            "note: of photographs, pixels can ask for a lambda that every network's features "
            "find worse (docs/study.md): prefer the --features by which samples are judged"
        )
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    every = {
        "num_chains": cfg.num_chains,
        "of_all": of_all,
        "form": cfg.form,
        "groups": cfg.groups,
        "features": features,
        "features_name": os.path.basename(cfg.features),
        "store": TrialStore(f"{out}.trials-{key[:8]}"),
    }
    return {name: value for name, value in every.items() if name in RULES[cfg.by].options}


if __name__ == "__main__":
    command(main)
