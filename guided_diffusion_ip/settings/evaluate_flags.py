"""The flags of evaluating samples."""

from __future__ import annotations

from ..metrics.registry import METRIC_NAMES
from .flag import Flag, Role, size_or_none

# evaluations/evaluator.py: samples against a reference.
FEATURES = (
    Flag(
        "features",
        "inception",
        Role.IMAGES,
        "feature space: inception, a FILE.onnx, pixels (tiny images), wavelets, random",
    ),
    Flag(
        "inception_weights",
        "",
        Role.INPUT,
        "Inception's weights: torch-fidelity's .pth or ADM's classify_image_graph_def.pb; default: "
        "$GUIDED_DIFFUSION_IP_INCEPTION, or the user's cache",
    ),
    Flag(
        "download",
        False,
        Role.PLACE,
        "download Inception's weights (95 MB) into the user's cache if they are nowhere",
    ),
    Flag("batch_size", 64, Role.SPEED, "images per process at a time", least=1, most=1_000_000),
    Flag(
        "device", "auto", Role.SPEED, "auto: a GPU if there is one", choices=("auto", "cpu", "cuda")
    ),
    Flag(
        "precision",
        "fp32",
        Role.ARITHMETIC,
        "number format of the feature network; bf16 is faster and changes FID slightly",
        choices=("fp32", "bf16"),
    ),
    Flag(
        "image_size",
        "",
        Role.IMAGES,
        "scale and crop all images as training does, to this size; default: as they are",
        size_or_none,
    ),
)
EVALUATE = (
    Flag(
        "ref",
        "",
        Role.INPUT,
        "reference: an npz with arr_0 (images), with mu, sigma, mu_s, sigma_s (statistics) or "
        "both; a folder; a zip",
    ),
    Flag(
        "samples",
        "",
        Role.INPUT,
        "samples: an npz with arr_0 uint8 [N, H, W, 3], a folder, or a zip",
    ),
    Flag(
        "metrics",
        "fid,sfid,is,prec,recall",
        Role.IMAGES,
        f"what to compute, separated by commas: {METRIC_NAMES}",
    ),
    Flag(
        "num_samples",
        0,
        Role.IMAGES,
        "use the first so many samples; 0: all",
        least=0,
        most=100_000_000,
    ),
    *FEATURES,
    Flag(
        "pr_arithmetic",
        "float32",
        Role.IMAGES,
        "distances of precision and recall; half imitates the published evaluator's float16, which "
        "makes both a little larger",
        choices=("float32", "float64", "half"),
    ),
    Flag("seed", 0, Role.IMAGES, "of KID's random subsets", least=0, most=2**63 - 1),
    Flag("json", "", Role.PLACE, "also write everything to this file"),
)
