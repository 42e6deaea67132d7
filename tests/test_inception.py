"""The Inception network against ADM's published evaluator, TensorFlow's resize and torch-fidelity's
network.
"""

import hashlib
import io
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import stand_in_inception as stand_in
import torch
import torch.nn.functional as F
from stand_in_inception import GOLDEN, images
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion_ip.features import inception
from guided_diffusion_ip.features.spaces import open_features
from guided_diffusion_ip.metrics import frechet_distance

QUICK = ("32x32", "48x80", "256x256")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return stand_in.write_pth(tmp_path_factory.mktemp("inception") / "stand_in.pth")


@pytest.fixture(scope="session")
def space(checkpoint):
    return open_features("inception", device="cpu", inception_weights=str(checkpoint))


@pytest.fixture(scope="session")
def theirs(checkpoint):
    """torch-fidelity's own network with the same weights: (images, dtype) -> (pool, spatial,
    logits) by its own forward.
    """
    safe = io.BytesIO(checkpoint.read_bytes())  # it unpickles what it gets: this file is ours
    network = inception.layer_library().FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
    )
    kept = {}
    network.Mixed_6d.register_forward_hook(lambda module, args, out: kept.update(out=out))
    network.Conv2d_1a_3x3.register_forward_pre_hook(
        lambda module, args: args[0].to(module.conv.weight.dtype)
    )

    @torch.no_grad()
    def features(x, dtype):
        network.to(dtype)
        pool, logits = network(torch.from_numpy(x).permute(0, 3, 1, 2))
        return pool, kept["out"][:, :7].permute(0, 2, 3, 1).reshape(len(x), -1), logits

    return features


def far(got, want):
    """Largest difference, as a part of the largest value."""
    want = torch.as_tensor(want, dtype=torch.float64)
    return float((got.double() - want).abs().max() / want.abs().max())


# ---- the network ----


def test_the_stand_in_weights_are_those_of_the_golden_numbers():
    digest = hashlib.sha256()
    for name, value in sorted(stand_in.state_dict().items()):
        digest.update(name.encode() + value.tobytes())
    assert digest.hexdigest()[:16] == "06228016d38b2a67"
    assert hashlib.sha256(images(1, 4, 48, 80).tobytes()).hexdigest()[:16] == "a1413d89bf20983b"


@pytest.mark.parametrize(
    "size",
    [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in GOLDEN["features"]],
)
def test_features_are_those_of_the_published_evaluator(space, size):
    want, (height, width) = GOLDEN["features"][size], map(int, size.split("x"))
    found = space(images(1, 2, height, width))
    for name, values, first in (
        ("pool", found.pool.double(), 8),
        ("spatial", found.spatial.double(), 14),
    ):
        # Entries are a part of the largest value of all, which is more than the largest of the
        # first few.
        difference = values[:, :first] - torch.tensor(
            want[f"{name}_first{first}"], dtype=torch.float64
        )
        assert float(difference.abs().max() / values.max()) < 5e-5
        assert far(values.sum(1), want[f"{name}_sum"]) < 2e-5
        assert far(values.norm(dim=1), want[f"{name}_norm"]) < 2e-5


@pytest.mark.slow
def test_frechet_distances_are_those_of_the_published_evaluator(space):
    def moments(kind, n):
        found = [space(batch) for batch in np.split(images(kind, n, 64, 64), n // 32)]
        rows = [
            torch.cat([getattr(f, name) for f in found]).double().numpy()
            for name in ("pool", "spatial")
        ]
        return [(x.mean(0), np.cov(x, rowvar=False)) for x in rows]

    for name, a, b in zip(("fid", "sfid"), moments(0, 256), moments(1, 192)):
        assert frechet_distance(*a, *b) == pytest.approx(GOLDEN["exact_frechet"][name], rel=2e-5)


@pytest.mark.parametrize("side", [32, 299])
@pytest.mark.parametrize("n", [1, 3])
def test_features_are_those_of_torch_fidelity(space, theirs, n, side):
    x = images(0, n, side, side)
    found = space(x)
    # Some of these random weights enlarge float32's rounding to 4e-5, so theirs is measured against
    # float64 as well.
    for got, rough, want in zip(
        (found.pool, found.spatial, found.logits),
        theirs(x, torch.float32),
        theirs(x, torch.float64),
        strict=True,
    ):
        assert got.shape == want.shape and got.dtype == torch.float32
        assert far(got, want) < 3 * far(rough, want) + 1e-7


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (32, 32), (48, 80), (299, 299), (300, 100), (512, 384)]
)
def test_resize_is_tensorflows_bit_for_bit(size):
    before = inception._forget()
    try:  # the function is in a module that the layers' module imports
        interpolate = inception.layer_library().interpolate_bilinear_2d_like_tensorflow1x
    finally:
        sys.modules.update(before)
    x = torch.from_numpy(images(0, 2, *size)).float()
    want = interpolate(x.permute(0, 3, 1, 2), size=(299, 299), align_corners=False)
    assert torch.equal(inception.resize(x).permute(0, 3, 1, 2), want)
    assert torch.equal((want - 128) * 0.0078125, (want - 128) / 128)


class Made(TorchDispatchMode):
    """Counts the places that are laid out for a resize."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.arange
        return func(*args, **(kwargs or {}))


def test_places_are_laid_out_once_per_size_and_may_be_differentiated_through():
    batches = [
        torch.from_numpy(images(0, n, height, 47)).float()
        for n, height in ((2, 53), (2, 53), (1, 53), (2, 61), (2, 47))
    ]
    inception._grid.cache_clear()
    with torch.inference_mode(), Made() as made:
        found = [inception.resize(x) for x in batches]
    assert made.count == 3, "of sides 53, 47, 61"
    assert torch.equal(found[0], found[1]) and torch.equal(found[0][:1], found[2])
    assert inception._grid.cache_info().maxsize <= 64
    x = batches[0].clone().requires_grad_()
    inception.resize(x).sum().backward()
    assert float(x.grad.sum()) == pytest.approx(2 * 299 * 299 * 3, rel=1e-5)


def test_half_pixel_resize_would_be_another():
    x = torch.from_numpy(images(0, 2, 64, 64)).float()
    other = F.interpolate(
        x.permute(0, 3, 1, 2), (299, 299), mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    assert far(other, inception.resize(x)) > 0.1


def test_features_depend_on_batch_size_by_rounding_only(space):
    x = images(1, 5, 40, 24)
    together, alone = space(x), [space(x[i : i + 1]) for i in range(5)]
    for name in ("pool", "spatial", "logits"):
        assert far(torch.cat([getattr(f, name) for f in alone]), getattr(together, name)) < 1e-5


def test_no_images_make_no_features(space):
    found = space(np.zeros((0, 32, 32, 3), np.uint8))
    assert [found.pool.shape, found.spatial.shape, found.logits.shape] == [
        (0, 2048),
        (0, 2023),
        (0, 1008),
    ]


def test_spatial_features_are_in_the_graphs_order_and_logits_have_no_bias(space):
    state, found = stand_in.state_dict(), space(images(0, 3, 64, 64))
    spatial = found.spatial.reshape(-1, 17, 17, 7)
    assert far(spatial.permute(0, 3, 1, 2).flatten(1), found.spatial) > 0.1
    want = found.pool.double() @ torch.from_numpy(state["fc.weight"]).double().T
    assert far(found.logits, want) < 1e-6
    assert far(want + torch.from_numpy(state["fc.bias"]), want) > 1e-2
    assert float(found.spatial.min()) == 0  # after the ReLU


def test_grey_images_are_three_equal_channels(space):
    grey = images(0, 2, 32, 32)[..., :1]
    assert torch.equal(space(grey).pool, space(torch.from_numpy(grey).repeat(1, 1, 1, 3)).pool)


def test_features_may_be_changed_in_place(space):
    found = space(images(0, 1, 16, 16))
    found.pool.sub_(1)
    assert not found.pool.is_inference()


def test_bf16_is_coarser_and_says_so(space, checkpoint):
    coarse = open_features(
        "inception", device="cpu", inception_weights=str(checkpoint), precision="bf16"
    )
    assert "bf16" in coarse.warnings[-1] and coarse.describe()["precision"] == "bf16"
    x = images(1, 2, 299, 299)
    a, b = space(x), coarse(x)
    for name in ("pool", "spatial", "logits"):
        exact, rough = getattr(a, name), getattr(b, name)
        assert rough.dtype == torch.float32
        assert 1e-3 < float((exact - rough).norm() / exact.norm()) < 0.1


def test_a_surrounding_autocast_changes_no_feature(space):
    x = images(1, 2, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = space(x)
    outside = space(x)
    for name in ("pool", "spatial", "logits"):
        assert getattr(inside, name).dtype == torch.float32 and torch.equal(
            getattr(inside, name), getattr(outside, name)
        ), name


@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_float32_is_float32_while_the_network_runs_and_as_before_afterwards(space, matmul):
    def switches():
        b = torch.backends
        if not hasattr(b.cudnn, "conv"):
            return b.cudnn.allow_tf32, b.cuda.matmul.allow_tf32
        return [
            p.fp32_precision for p in (b.cudnn.conv, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul)
        ]

    seen, before = [], torch.get_float32_matmul_precision()
    handle = space._network.fc.register_forward_hook(
        lambda *args: seen.append((switches(), torch.get_float32_matmul_precision()))
    )
    torch.set_float32_matmul_precision(matmul)
    try:
        own = switches()
        space(images(0, 1, 16, 16))
        assert switches() == own and torch.get_float32_matmul_precision() == matmul
    finally:
        handle.remove()
        torch.set_float32_matmul_precision(before)
    assert [(set(found), word) for found, word in seen] in (
        [({"ieee"}, "highest")],
        [({False}, "highest")],
    )


# ---- the package that the layers come from ----


def test_the_layers_leave_no_trace_of_a_package_that_was_not_imported(monkeypatch):
    sentinel = types.ModuleType("torch_fidelity.helpers")
    inception._forget()
    monkeypatch.setitem(sys.modules, "torch_fidelity.helpers", sentinel)
    assert inception.layer_library().BasicConv2d
    found = {name: m for name, m in sys.modules.items() if name.startswith("torch_fidelity")}
    assert found == {"torch_fidelity.helpers": sentinel}


def test_the_real_package_is_imported_as_ever_afterwards(tmp_path):
    """Beside a torchvision that does not load: the layers do not need it, the package says so as it
    would without us.
    """
    (tmp_path / "torchvision.py").write_text("raise ImportError('no compiled part')")
    code = "from guided_diffusion_ip.features import inception; inception.parameter_shapes(); import torch_fidelity"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        run.stderr.strip().endswith("no compiled part")
        and "torch_fidelity/__init__.py" in run.stderr
    )


def test_a_missing_or_old_package_is_one_clear_error(monkeypatch, tmp_path):
    found = tmp_path / "torch_fidelity-0.3.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-fidelity\nVersion: 0.3.0\n")
    with monkeypatch.context() as m:
        m.syspath_prepend(str(tmp_path))
        with pytest.raises(ValueError, match=r"0\.3\.0.*0\.4.*\[eval\]"):
            inception.layer_library()
        m.setattr(sys, "path", [])
        with pytest.raises(ValueError, match=r"not installed.*\[eval\]"):
            inception.layer_library()
