"""Are samples B better than samples A, drawn with equal noise? FID and KID, their change and its
standard error.

    python evaluations/compare.py REF A.npz B.npz --features FILE.onnx

Image i of both files must come from the same noise and class: sampled with equal --seed and number
of images. What the noise happens to be like then cancels from the difference, whose error (a
jackknife over 20 groups of images) is far smaller than that of either distance. REF: as for
evaluator.py; without statistics in it, its images are gone through each time (make_reference.py).
"""

from __future__ import annotations

from guided_diffusion_ip import dist_util
from guided_diffusion_ip.dist_util import say
from guided_diffusion_ip.evaluation.paired import changes, replicates_of
from guided_diffusion_ip.settings.config import command, parse
from guided_diffusion_ip.settings.evaluation import comparison_request


def main() -> None:
    cfg = parse("compare", __doc__)
    dist_util.setup_dist()
    request = comparison_request(cfg)
    before, after = replicates_of(request, say)
    for name, change in changes(before, after).items():
        say(f"{name}: {change.text}")
    dist_util.cleanup()


if __name__ == "__main__":
    command(main)
