"""Evaluate samples against a reference: FID, sFID, Inception Score, precision, recall, KID.

    python evaluations/evaluator.py REF SAMPLES \\
        --inception_weights weights-inception-2015-12-05-6726825d.pth
    python evaluations/evaluator.py REF SAMPLES --features pixels --json result.json
    torchrun --nproc_per_node 4 evaluations/evaluator.py REF SAMPLES   (or mpiexec -n 4 python ...)

REF and SAMPLES: an npz with arr_0 uint8 [N, H, W, 3], a folder or a zip of images. REF may hold
statistics (mu, sigma, mu_s, sigma_s) besides or instead, as OpenAI's reference files and those of
evaluations/make_reference.py do. With --config, the paper's value for the samples' settings stands
beside ours. What each number means: evaluations/README.md.
"""

from __future__ import annotations

from guided_diffusion_ip import dist_util, files
from guided_diffusion_ip.dist_util import say
from guided_diffusion_ip.evaluation.evaluate import evaluate
from guided_diffusion_ip.evaluation.report import as_json, published_lines, table
from guided_diffusion_ip.settings.config import command, parse
from guided_diffusion_ip.settings.evaluation import evaluation_request


def main() -> None:
    cfg = parse("evaluator", __doc__)
    dist_util.setup_dist()
    evaluation = evaluate(evaluation_request(cfg), say)
    if dist_util.is_main():
        print("\n" + table(evaluation, cfg.paper))
        if evaluation.features["name"] == "inception":
            print("\n" + published_lines(evaluation.values))
        if cfg.json:
            with files.atomic_file(cfg.json) as file:
                file.write(as_json(evaluation, cfg.paper, cfg.config_path).encode())
    dist_util.cleanup()


if __name__ == "__main__":
    command(main)
