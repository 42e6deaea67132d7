"""Measure how long the metrics take on this machine, on synthetic features.

    OMP_NUM_THREADS=1 python -m tools.benchmark.metrics
    python -m tools.benchmark.metrics --images 50000 --only precision_recall --device cuda

Frechet distance: against scipy.linalg.sqrtm of the product of the covariances, which most programs
use; both in turn in this process, covariances of full rank. Threads: OMP_NUM_THREADS holds for
both. Precision and recall: all three passes, with the memory they take beyond the features (CPU:
resident set, Linux). Inception: images/s of ours and of torch-fidelity's network as it comes, with
equal random weights (their values do not change the speed), in turn in this process.
"""

import argparse
import io
import statistics
import time

import numpy as np
import torch

from guided_diffusion_ip.features import inception
from guided_diffusion_ip.metrics import FeatureStatistics, frechet_distance, precision_recall
from guided_diffusion_ip.settings.config import command
from tools.benchmark.machine import Machine, PeakMemory, choose_device, timed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        choices=("frechet", "precision_recall", "inception"),
        help="one of these (default: all)",
    )
    parser.add_argument(
        "--dim", type=int, default=2048, help="entries of a feature row (default: 2048)"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=10_000,
        help="of each set, for precision and recall (default: 10000)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="of the Frechet distance; the median counts (default: 3)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="images in a batch, for Inception (default: 16)"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda", "auto"),
        help="of all but the Frechet distance (cpu)",
    )
    args = parser.parse_args()
    for name, least in ("dim", 2), ("images", 4), ("repeats", 1), ("batch_size", 1):
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name} {getattr(args, name)} is too small, it must be at least {least}"
            )
    device = choose_device(args.device)
    print(f"{Machine.look(device)}\n", flush=True)
    if args.only in (None, "frechet"):
        frechet(args.dim, args.repeats)
    if args.only in (None, "inception"):
        networks(args.batch_size, args.repeats, device)
    if args.only in (None, "precision_recall"):
        manifold(args.images, args.dim, device)


def features(n: int, dim: int, seed: int) -> np.ndarray:
    """float32 [n, dim], ReLU of normal numbers of unequal scales: about as spread as features of a
    network.
    """
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.3, 1, dim).astype(np.float32)
    return np.maximum(rng.standard_normal((n, dim), dtype=np.float32) * scale + 0.01 * seed, 0)


def frechet(dim: int, repeats: int) -> None:
    from scipy.linalg import sqrtm

    moments = []
    for seed in range(2):
        side = FeatureStatistics()
        side.update(features(2 * dim + 100, dim, seed))
        moments += [side.mean, side.cov]
    (mu1, sigma1, mu2, sigma2), seconds, values = moments, {"ours": [], "sqrtm": []}, {}

    def by_sqrtm() -> float:
        root = np.trace(sqrtm(sigma1 @ sigma2)).real
        return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * root)

    for _ in range(repeats):
        for name, work in ("ours", lambda: frechet_distance(*moments)), ("sqrtm", by_sqrtm):
            start = time.perf_counter()
            values[name] = work()
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "sqrtm"))
    print(f"Frechet distance, {dim} dimensions, full rank, median of {repeats}:")
    print(
        f"  {'ours':<24}{ours:10.2f} s\n  {'scipy.linalg.sqrtm':<24}{theirs:10.2f} s\n  "
        f"{'ratio':<24}{theirs / ours:10.1f}"
    )
    print(
        f"  {'relative difference':<24}{abs(values['ours'] / values['sqrtm'] - 1):10.1e}\n",
        flush=True,
    )


def networks(batch_size: int, repeats: int, device: torch.device) -> None:
    torch.manual_seed(0)
    state = {
        name: torch.ones(shape) if name.endswith("running_var") else torch.randn(shape) * 0.05
        for name, shape in inception.parameter_shapes().items()
    }
    ours = inception.build(state, device)
    checkpoint = io.BytesIO()
    torch.save({**state, "fc.bias": torch.zeros(1008)}, checkpoint)
    checkpoint.seek(0)
    theirs = (
        inception.layer_library()
        .FeatureExtractorInceptionV3(
            "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=checkpoint
        )
        .to(device)
    )

    def images_per_second(work) -> float:
        with torch.no_grad():
            return batch_size / timed(work, device)

    print(f"Inception, batch {batch_size}, median of {repeats}, images/s:")
    print(f"  {'':<24}{'ours fp32':>12}{'ours bf16':>12}{'theirs fp32':>14}{'ratio fp32':>12}")
    for size in (32, 256):
        images = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8).to(device)
        ways = (
            lambda: ours(images),  # noqa: B023
            lambda: ours(images, bf16=True),  # noqa: B023
            lambda: theirs(images.permute(0, 3, 1, 2)),  # noqa: B023
        )
        rates: list[list[float]] = [[], [], []]
        for _ in range(repeats + 1):  # the first round warms up
            for way, found in zip(ways, rates):
                found.append(images_per_second(way))
        fp32, bf16, other = (statistics.median(found[1:]) for found in rates)
        print(
            f"  {f'{size} x {size}':<24}{fp32:12.1f}{bf16:12.1f}{other:14.1f}{fp32 / other:12.2f}",
            flush=True,
        )
    print()


def manifold(n: int, dim: int, device: torch.device) -> None:
    sets = [features(n, dim, seed) for seed in range(2)]
    memory, result = PeakMemory(device), []
    memory.start()
    seconds = timed(lambda: result.append(precision_recall(*sets, device=device)), device)
    growth = memory.growth()
    gflop = 3 * 2e-9 * n * n * dim
    print(
        f"Precision and recall, {n} x {n} x {dim}, float32 ({result[0][0]:.4f}, "
        f"{result[0][1]:.4f}):"
    )
    print(
        f"  {'time':<24}{seconds:10.2f} s\n  {'rate, three passes':<24}{gflop / seconds:10.1f} "
        "GFLOP/s"
    )
    print(f"  {'features':<24}{2 * sets[0].nbytes / 1e6:10.0f} MB")
    print(
        f"  {'memory beyond them':<24}{'unknown' if growth is None else f'{growth / 1e6:10.0f} MB'}"
    )


if __name__ == "__main__":
    command(main)
