"""UNets: what checkpoints and users rely on. Published outputs, parameter names, sizes, errors.

networks_golden.npz holds outputs (float32, every (H / 16)th pixel) and state_dicts of the published
guided-diffusion code; networks_state_dicts.json the names of all published settings, as hashes.
"""

import ast
import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_tools import (
    DATA,
    load_seeded_weights,
    relative_error,
    seeded_image,
    seeded_normal,
    state_dict_lines,
)

from guided_diffusion_ip import networks
from guided_diffusion_ip.networks import (
    EncoderUNetModel,
    SuperResModel,
    UNetModel,
    attention_downsample_rates,
    default_channel_mult,
    parse_channel_mult,
)

GOLDEN = np.load(DATA / "networks_golden.npz")
STATE_DICTS = json.loads((DATA / "networks_state_dicts.json").read_text())
T = torch.tensor([3, 741])


def build(image_size, width, res_blocks, attention, out_channels=6, cls=UNetModel, **options):
    """A network from the flags with which such models are published."""
    mult = default_channel_mult(image_size, super_resolution=cls is SuperResModel)
    rates = attention_downsample_rates(image_size, attention)
    return cls(image_size, 3, width, out_channels, res_blocks, rates, channel_mult=mult, **options)


NEW = dict(use_scale_shift_norm=True, resblock_updown=True, use_new_attention_order=True)
LEGACY = dict(use_scale_shift_norm=True, resblock_updown=True)

GOLDEN_UNETS = {
    "cifar10_like": lambda: build(32, 32, 2, "16,8", num_head_channels=16, **NEW),
    "plain_ddpm_like": lambda: build(32, 32, 1, "16,8", out_channels=3, num_heads=1),
    "class_cond_legacy_attention": lambda: build(
        32, 32, 1, "16,8", num_head_channels=8, num_classes=10, use_scale_shift_norm=True
    ),
    "image64": lambda: build(64, 32, 1, "32,16,8", num_head_channels=32, **NEW),
}
GOLDEN_CLASSIFIERS = {
    pool: lambda pool=pool, updown=updown: build(
        64,
        64,
        2,
        "32,16,8",
        1000,
        EncoderUNetModel,
        num_head_channels=64,
        pool=pool,
        use_scale_shift_norm=True,
        resblock_updown=updown,
    )
    for pool, updown in (("attention", True), ("adaptive", False))
}

PUBLISHED = {
    # DDPM-IP (Ning et al. 2023); baselines share the names
    "cifar10": lambda: build(32, 128, 3, "16,8", num_head_channels=32, **NEW),
    "imagenet32": lambda: build(32, 128, 3, "16,8", num_head_channels=32, **NEW),
    "imagenet32_no_scale_shift": lambda: build(
        32, 128, 3, "16,8", num_head_channels=32, **{**NEW, "use_scale_shift_norm": False}
    ),
    "lsun_tower64": lambda: build(64, 192, 3, "32,16,8", num_head_channels=64, **NEW),
    "celeba64": lambda: build(64, 192, 3, "32,16,8", num_head_channels=64, **NEW),
    "ffhq128": lambda: build(128, 256, 3, "32,16,8", num_head_channels=64, **NEW),
    # ADM (Dhariwal & Nichol 2021)
    "imagenet64_cond": lambda: build(
        64, 192, 3, "32,16,8", num_head_channels=64, num_classes=1000, **NEW
    ),
    "imagenet128_cond": lambda: build(
        128, 256, 2, "32,16,8", num_heads=4, num_classes=1000, **LEGACY
    ),
    **{
        f"openai{size}_{kind}": lambda size=size, classes=classes: build(
            size, 256, 2, "32,16,8", num_head_channels=64, num_classes=classes, **LEGACY
        )
        for size in (256, 512)
        for kind, classes in (("uncond", None), ("cond", 1000))
    },
    "upsampler_64_256": lambda: build(
        256, 192, 2, "32,16,8", cls=SuperResModel, num_heads=4, num_classes=1000, **LEGACY
    ),
    "upsampler_128_512": lambda: build(
        512, 192, 2, "32,16", cls=SuperResModel, num_head_channels=64, num_classes=1000, **LEGACY
    ),
    **{
        f"classifier{size}": lambda size=size, depth=depth: build(
            size,
            128,
            depth,
            "32,16,8",
            1000,
            EncoderUNetModel,
            num_head_channels=64,
            pool="attention",
            **LEGACY,
        )
        for size, depth in ((64, 4), (128, 2), (256, 2), (512, 2))
    },
}


# Published outputs and names


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", GOLDEN_UNETS)
def test_unet_agrees_with_the_published_one(name, layout):
    model = load_seeded_weights(GOLDEN_UNETS[name]()).to(memory_format=layout)
    assert state_dict_lines(model) == str(GOLDEN[f"unet/{name}/state_dict"]).splitlines()
    side = model.image_size[0]
    x = seeded_normal(f"{name}/x", (2, 3, side, side)).contiguous(memory_format=layout)
    labels = [torch.tensor([1, 7])] if model.num_classes else []
    with torch.no_grad():
        out = model(x, T, *labels)[:, :, :: side // 16, :: side // 16]
    assert relative_error(out, GOLDEN[f"unet/{name}/output"]) < 2e-5


@pytest.mark.parametrize("pool", GOLDEN_CLASSIFIERS)
def test_classifier_agrees_with_the_published_one(pool):
    model = load_seeded_weights(GOLDEN_CLASSIFIERS[pool]())
    assert state_dict_lines(model) == str(GOLDEN[f"classifier/{pool}/state_dict"]).splitlines()
    with torch.no_grad():
        out = model(seeded_normal(f"cls/{pool}", (2, 3, 64, 64)), torch.tensor([10, 500]))
    assert relative_error(out, GOLDEN[f"classifier/{pool}/output"]) < 2e-5


def test_super_resolution_agrees_with_the_published_one():
    model = load_seeded_weights(
        build(64, 32, 1, "16,8", 3, SuperResModel, num_head_channels=16, use_scale_shift_norm=True)
    )
    assert state_dict_lines(model) == str(GOLDEN["sr/state_dict"]).splitlines()
    x, low = seeded_normal("sr/x", (2, 3, 64, 64)), seeded_image("sr/low", (2, 3, 32, 32))
    with torch.no_grad():
        out = model(x, T, low_res=low)[:, :, ::4, ::4]
    assert relative_error(out, GOLDEN["sr/output"]) < 2e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dicts_of_published_settings_never_change(name):
    """Checkpoints are out there: another name, order or shape breaks them or their optimizers."""
    with torch.device("meta"):
        model = PUBLISHED[name]()
    lines = state_dict_lines(model)
    assert {
        "parameters": sum(p.numel() for p in model.parameters()),
        "entries": len(lines),
        "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    } == STATE_DICTS[name]


def test_parameter_order_is_that_of_the_state_dict():
    # Optimizer states are stored by position among the parameters.
    for make in (*GOLDEN_UNETS.values(), *GOLDEN_CLASSIFIERS.values()):
        model = make()
        assert [n for n, _ in model.named_parameters()] == list(model.state_dict())


# Sizes


@pytest.mark.parametrize(
    "size, mult",
    [
        (8, (1, 2, 2)),
        (20, (1, 2, 2)),
        (24, (1, 2, 2, 2)),
        (32, (1, 2, 2, 2)),
        (48, (1, 2, 2, 2)),
        (56, (1, 2, 3, 4)),
        (64, (1, 2, 3, 4)),
        (96, (1, 2, 3, 4)),
        (112, (1, 1, 2, 3, 4)),
        (128, (1, 1, 2, 3, 4)),
        (192, (1, 1, 2, 3, 4)),
        (224, (1, 1, 2, 2, 4, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (384, (1, 1, 2, 2, 4, 4)),
        (448, (0.5, 1, 1, 2, 2, 4, 4)),
        (512, (0.5, 1, 1, 2, 2, 4, 4)),
        (1024, (0.5, 1, 1, 2, 2, 4, 4)),
        ((64, 32), (1, 2, 3, 4)),
        ((128, 256), (1, 1, 2, 2, 4, 4)),
    ],
)
def test_default_channel_mult(size, mult):
    assert default_channel_mult(size) == mult


def test_default_channel_mult_of_super_resolution():
    assert default_channel_mult(512, super_resolution=True) == (1, 1, 2, 2, 4, 4)
    assert default_channel_mult(256, super_resolution=True) == (1, 1, 2, 2, 4, 4)
    assert default_channel_mult(64, super_resolution=True) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "size, nearest",
    [
        (28, "24 or 32"),
        ((32, 28), "24 or 32"),
        (3, "to 4,"),
        (50, "48 or 56"),
        (100, "96 or 112"),
        (300, "288 or 320"),
        (500, "448 or 512"),
    ],
)
def test_a_size_that_does_not_fit_is_told_its_neighbours(size, nearest):
    with pytest.raises(ValueError, match=nearest):
        default_channel_mult(size)


def test_the_neighbours_of_every_size_fit():
    for side in range(4, 700):
        try:
            default_channel_mult(side)
        except ValueError as error:
            below, above = str(error).split(" to ")[1].split(",")[0].split(" or ")
            assert int(below) < side < int(above)
            default_channel_mult(int(below)), default_channel_mult(int(above))


@pytest.mark.parametrize(
    "given, want",
    [
        ("1,2,2", (1, 2, 2)),
        ("0.5,1", (0.5, 1)),
        (" 1, 1.5 ", (1, 1.5)),
        ([1, 2.0], (1, 2)),
        ("4", (4,)),
    ],
)
def test_parse_channel_mult(given, want):
    got = parse_channel_mult(given)
    assert got == want and [type(v) for v in got] == [type(v) for v in want]


@pytest.mark.parametrize("given", ["", "1,,2", "1,x", "0,1", "-1,2", "nan", "inf", [], 3])
def test_parse_channel_mult_refuses(given):
    with pytest.raises(ValueError, match="channel_mult is .*: give positive numbers"):
        parse_channel_mult(given)


def test_attention_downsample_rates():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention_downsample_rates(32, "16,8") == (2, 4)
        assert attention_downsample_rates(512, "32,16,8") == (16, 32, 64)
        assert attention_downsample_rates((128, 64), [32, 16]) == (2, 4)
        assert attention_downsample_rates(8, "16,8") == (0, 1)
        assert attention_downsample_rates(32, "") == ()
    with pytest.warns(UserWarning, match="resolution 16 has no effect: images of 48 pixels"):
        assert attention_downsample_rates(48, "16,12") == (3, 4)
    for wrong in ("16;8", "0", "-8", "8.5"):
        with pytest.raises(ValueError, match="attention_resolutions is .*: give whole numbers"):
            attention_downsample_rates(32, wrong)


# Errors


def tiny(cls=UNetModel, **changes):
    options = dict(
        image_size=8,
        in_channels=3,
        model_channels=32,
        out_channels=3,
        num_res_blocks=1,
        attention_resolutions=(),
        channel_mult=(1, 2),
    )
    return cls(**{**options, **changes})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(model_channels=48), "48 channels cannot be normalised in 32 groups: choose"),
        (
            dict(num_head_channels=48),
            "attention over 64 channels with num_head_channels 48: .*change",
        ),
        (dict(num_heads=3), "attention over 64 channels with num_heads 3: .*change"),
        (dict(dims=4), "dims is 4: use 1, 2, 3"),
        (
            dict(attention_resolutions="16,8"),
            "downsample rates such as .*: attention_downsample_rates",
        ),
        (dict(image_size=(8, 8, 8)), r"image_size=\(8, 8, 8\): give"),
        (
            dict(cls=EncoderUNetModel, pool="mean"),
            "'mean': use one of adaptive, attention, spatial",
        ),
        (dict(cls=EncoderUNetModel, pool="attention"), "num_head_channels -1: give the width"),
        (
            dict(cls=EncoderUNetModel, pool="attention", num_head_channels=32, image_size=9),
            "8 or 10,",
        ),
    ],
)
def test_impossible_models_are_refused_with_a_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def zeros(*shape):
    return torch.zeros(shape)


COND = {"num_classes": 5}
SR = {"cls": SuperResModel}
X = zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "options, x, t, more, message",
    [
        ({}, zeros(2, 3, 8, 9), T, {}, "side of 9 .*multiples of 2: resize or pad it to 8 or 10"),
        (
            {},
            zeros(2, 1, 8, 8),
            T,
            {},
            r"\(2, 1, 8, 8\), but this model takes 3 channels .*: convert",
        ),
        ({}, zeros(2, 3, 8), T, {}, r"\(2, 3, 8\), but this model takes 3 channels in 2 spatial"),
        ({}, zeros(3, 3, 8, 8), T, {}, r"timesteps have shape \(2,\) for a batch of 3: give"),
        ({}, X, T, {"y": T}, "labels y, but this model is unconditional: leave"),
        (COND, X, T, {}, r"class-conditional: pass y, int64 \[2\] .* 0 to 4"),
        (COND, X, T, {"y": torch.tensor([0, 5])}, "range from 0 to 5: pass"),
        (COND, X, T, {"y": torch.tensor([-1, 4])}, "range from -1 to 4: pass"),
        (COND, X, T, {"y": torch.tensor(1)}, r"shape \(\) for a batch of 2: pass"),
        (SR, X, T, {}, r"pass low_res, \[2, 3, h, w\]"),
        (SR, X, T, {"low_res": zeros(2, 1, 4, 4)}, "and 3 channels"),
    ],
)
def test_wrong_inputs_are_refused_with_a_remedy(options, x, t, more, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)(x, t, **more)


def test_labels_are_not_read_where_that_would_stall_the_device():
    with torch.device("meta"):
        model = tiny(num_classes=5)
        out = model(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert out.shape == (2, 3, 8, 8)


# Layering


def test_networks_import_only_torch_and_each_other():
    for path in Path(networks.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                within = node.level == 1 or (node.level, node.module) == (2, "sizes")  # a leaf
                assert within, f"{path.name} imports from outside networks"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module]
                roots = {name.split(".")[0] for name in names}
                assert not roots & {"numpy", "guided_diffusion_ip"}, path.name
