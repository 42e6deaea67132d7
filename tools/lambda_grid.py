"""What constant lambdas are worth, over a grid, beside calibrated ones.

    python tools/lambda_grid.py --reference REF --features FILE.onnx --image_size 32 \\
        --grid 0.96,0.98,1.02 --seeds 0 --count 5000 --calibrated eps.yaml,more.yaml \\
        --out grid.json -- --model_path ... --use_ddim True --timestep_respacing 10 --batch_size 250

What follows -- are flags of scripts/image_sample.py. For every seed, equal noise for all lambdas:
FID and KID in the features, and their change from lambda = 1 with its standard error. Printed, and
kept in --out: the same command again computes no lambda twice. The share of the best gain that
each calibrated lambda reaches is printed last, where that gain is two standard errors or more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import numpy as np

from guided_diffusion_ip import dist_util, files
from guided_diffusion_ip.data.image_io import to_uint8
from guided_diffusion_ip.data.image_set import ImageSet
from guided_diffusion_ip.data.image_source import ArraySource
from guided_diffusion_ip.diffusion.epsilon_scaling import EpsilonScaling
from guided_diffusion_ip.evaluation.opening import FeatureChoice
from guided_diffusion_ip.evaluation.paired import Change, ComparisonRequest, changes, open_reference
from guided_diffusion_ip.runs.sample_batch import Sampler, draw_labels
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.lambda_file import read_schedule
from guided_diffusion_ip.settings.make_sampler import make_sampler
from guided_diffusion_ip.settings.models import load_model_and_diffusion
from guided_diffusion_ip.settings.sampling import complete_settings
from guided_diffusion_ip.sizes import parse_size


def main() -> None:
    split = sys.argv.index("--")
    arguments = flags().parse_args(sys.argv[1:split])
    sys.argv = [sys.argv[0], *sys.argv[split + 1 :]]
    cfg = complete_settings(parse("image_sample", __doc__))
    model, diffusion = load_model_and_diffusion(cfg)
    plain = make_sampler(cfg, diffusion, parse_size(cfg.image_size))
    size = parse_size(arguments.image_size) if arguments.image_size else parse_size(cfg.image_size)
    request = ComparisonRequest(
        arguments.reference, (), FeatureChoice(arguments.features), 250, size, "auto"
    )
    space = request.features.open(dist_util.dev(), lambda line: None)
    first = ImageSet(ArraySource(np.zeros((1, *size, cfg.in_channels), np.uint8)))
    against = open_reference(request, space, first)
    lambdas = {"1": 1.0, **{f"{b:g}": b for b in map(float, arguments.grid.split(","))}}
    calibrated = {name_of(path): path for path in arguments.calibrated.split(",") if path}
    for name, path in calibrated.items():
        lambdas[name] = read_schedule(path, plain.num_steps)
    kept = read_kept(arguments.out)

    def rows_of(sampler: Sampler, labels: bool) -> np.ndarray:
        rows = []
        for start in range(0, arguments.count, cfg.batch_size):
            index = list(range(start, min(start + cfg.batch_size, arguments.count)))
            y = draw_labels(sampler.seed, index, range(cfg.num_classes)) if labels else None
            images = sampler(model, index, {} if y is None else {"y": y})
            made = to_uint8(images, sampler.rounded).numpy()
            rows.append(space(ImageSet(ArraySource(made), size).rows(0, len(made))).pool.numpy())
        return np.concatenate(rows)

    for seed in map(int, arguments.seeds.split(",")):
        for label, value in lambdas.items():
            key = f"{seed} {label}"
            if key not in kept:
                scaling = EpsilonScaling.of(*value) if isinstance(value, tuple) else value
                if not isinstance(scaling, EpsilonScaling):
                    scaling = EpsilonScaling.of(scaling)
                sampler = Sampler(**{**vars(plain), "seed": seed}).with_scaling(scaling)
                found = against.replicates(rows_of(sampler, cfg.class_cond))
                kept[key] = {name: values.tolist() for name, values in found.items()}
                if arguments.out:
                    with files.atomic_file(arguments.out) as file:
                        file.write(json.dumps(kept).encode())
    tell(kept, lambdas, list(calibrated), arguments.seeds.split(","))


def name_of(path: str) -> str:
    """Of a schedule, for the table."""
    return os.path.splitext(os.path.basename(path))[0]


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--features", default="pixels")
    parser.add_argument("--image_size", default="")
    parser.add_argument("--grid", default="0.96,0.97,0.98,0.99,1.01,1.02,1.03")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--calibrated", default="")
    parser.add_argument("--out", default="")
    return parser


def read_kept(path: str) -> dict:
    if not path or not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def tell(kept: dict, lambdas: dict, calibrated: list[str], seeds: list[str]) -> None:
    for name in next(iter(kept.values())):
        print(f"\n{name}: change from lambda = 1 (standard error)\n")
        print("| lambda |" + "".join(f" seed {seed} |" for seed in seeds) + " mean |")
        print("|---" * (len(seeds) + 2) + "|")
        means, errors = {}, {}
        for label in lambdas:
            found = [change(kept, seed, label, name) for seed in seeds]
            means[label] = float(np.mean([one.value for one in found]))
            errors[label] = float(np.linalg.norm([one.error for one in found])) / len(found)
            texts = [
                f"{one.after:.4g}" if label == "1" else f"{one.value:+.4g} ({one.error:.2g})"
                for one in found
            ]
            print(f"| {label} |" + "".join(f" {t} |" for t in texts) + f" {means[label]:+.4g} |")
        best = min(means, key=lambda label: means[label])
        if means[best] > -2 * errors[best] or best == "1":
            print("\nno lambda gains two standard errors: there is nothing to have a share of")
            continue
        for label in calibrated:
            print(f"\n{label}: {means[label] / means[best]:.0%} of the best gain, of lambda {best}")


def change(kept: dict, seed: str, label: str, name: str) -> Change:
    before, after = ({name: np.array(kept[f"{seed} {one}"][name])} for one in ("1", label))
    return changes(before, after)[name]


if __name__ == "__main__":
    main()
