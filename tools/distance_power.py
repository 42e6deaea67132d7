"""Which distance should choose lambda? Gain divided by its error, for distances and feature spaces.

    python tools/distance_power.py --spaces pixels,wavelets,random -- --model_path ... \\
        --data_dir ... --num_images 2000 --num_chains 500 --timestep_respacing 10 --use_ddim True

What follows -- are flags of scripts/calibrate_eps.py. Chains are drawn once for each b of a grid,
and once more with other noise; every distance then looks at the same images. Printed for each: the
b it finds and its standard error; its gain over lambda = 1, divided by the gain's error (the power
of the distance); the same on the other chains; and what that b does to every other distance there,
in the latter's errors (+ is better).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guided_diffusion_ip.exposure_bias.chains import (
    Chains,
    ImageFeatures,
    in_space,
    pixels,
    read_real_images,
)
from guided_diffusion_ip.exposure_bias.line_search import vertex
from guided_diffusion_ip.features.spaces import open_features
from guided_diffusion_ip.metrics.replicates import KERNELS, Distance, Replicates
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.make_sampler import make_sampler
from guided_diffusion_ip.settings.measuring import open_real_images
from guided_diffusion_ip.settings.models import load_model_and_diffusion
from guided_diffusion_ip.settings.sampling import complete_settings
from guided_diffusion_ip.sizes import parse_size

GRID = tuple(round(0.92 + 0.01 * n, 2) for n in range(18))  # 0.92 to 1.09


@dataclass(frozen=True)
class Candidate:
    name: str
    distance: Distance
    curve: dict[float, Replicates]
    other: dict[float, Replicates]

    @property
    def best(self) -> float:
        return min(self.curve, key=lambda b: self.curve[b][0])

    def found(self) -> tuple[float, float]:
        """b and its standard error."""
        grid = sorted(self.curve)
        at = min(max(grid.index(self.best), 1), len(grid) - 2)
        a, b, c = grid[at - 1 : at + 2]
        place, _ = vertex((a, b, c), self.curve)
        return float(place[0]), self.distance.standard_error(place)

    def power(self, curve: dict[float, Replicates], b: float) -> float:
        gain = curve[1.0] - curve[b]
        return float(gain[0]) / max(self.distance.standard_error(gain), 1e-30)


def main() -> None:
    split = sys.argv.index("--")
    spaces = sys.argv[sys.argv.index("--spaces") + 1].split(",")
    sys.argv = [sys.argv[0], *sys.argv[split + 1 :]]
    cfg = complete_settings(parse("calibrate_eps", __doc__))
    model, diffusion = load_model_and_diffusion(cfg)
    sampler = make_sampler(cfg, diffusion, parse_size(cfg.image_size))
    real = open_real_images(cfg, parse_size(cfg.image_size))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def flat(images: Tensor, rounded: bool = False) -> Tensor:
        return images.flatten(1)

    images = read_real_images(real, len(real), 500, flat, device)
    chains = Chains(sampler, model, images.cond, cfg.num_chains, cfg.batch_size, device)
    drawn = [
        {
            b: torch.cat([x for _, x in part.finished(np.full(sampler.num_steps, b), f"{b}")])
            for b in GRID
        }
        for part in (chains, chains.with_other_noise())
    ]
    shape = (-1, *sampler.image_shape)
    found = []
    for spec in spaces:
        features: ImageFeatures = pixels
        if spec != "pixels":
            size = parse_size(cfg.feature_size) if cfg.feature_size else None
            space = open_features(spec, device=device, log=lambda line: None)
            features = in_space(space, size if spec.endswith(".onnx") else None)
        rows = features(images.rows.view(shape), True)
        rows_of = [{b: features(x, sampler.rounded) for b, x in part.items()} for part in drawn]
        for name, kernel in KERNELS.items():
            distance = Distance(kernel, rows, cfg.num_chains, 20)
            curves = [{b: distance(x) for b, x in part.items()} for part in rows_of]
            found.append(Candidate(f"{name} {spec.rpartition('/')[2]}", distance, *curves))
    tell(found)


def tell(found: list[Candidate]) -> None:
    print("| distance | b | power | other noise |" + "".join(f" {c.name} |" for c in found))
    print("|---" * (len(found) + 4) + "|")
    for candidate in found:
        b, error = candidate.found()
        own = candidate.power(candidate.curve, candidate.best)
        again = candidate.power(candidate.other, candidate.best)
        others = "".join(f" {c.power(c.other, candidate.best):+.1f} |" for c in found)
        print(f"| {candidate.name} | {b:.4f} ({error:.4f}) | {own:.1f} | {again:.1f} |{others}")


if __name__ == "__main__":
    main()
