"""EDM's networks: published outputs, names and sizes; conditions; training; their parts; errors.
Beside it: test_denoiser.py.

edm_networks_golden.npz holds D(x, sigma, labels) of three small networks of the published code,
edm_networks_golden.json how they were made and the names and shapes of their state_dicts.
"""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edm_tools import BOTH, NCSN, NOISE, SEED, SMALL, TINY, images, seeded, small
from golden_tools import DATA, relative_error, seeded_normal, state_dict_lines

from guided_diffusion_ip.diffusion.denoiser import EDMPrecond
from guided_diffusion_ip.networks.edm_layers import (
    Resample,
    Resampler,
    ResamplingConv2d,
    filter_kernel,
)
from guided_diffusion_ip.networks.edm_unets import DhariwalUNet, SongUNet
from guided_diffusion_ip.script_util import create_edm_denoiser

CASES = json.loads((DATA / "edm_networks_golden.json").read_text())
GOLDEN = np.load(DATA / "edm_networks_golden.npz")


# ---- published numbers ----


@pytest.mark.parametrize("name", sorted(CASES))
def test_published_names_and_outputs(name):
    case = CASES[name]
    denoiser = create_edm_denoiser(case["precond"], **case["kwargs"])
    assert sorted(state_dict_lines(denoiser)) == sorted(case["parameters"] + case["buffers"])
    in_order = [name for name, _ in denoiser.named_parameters()]
    assert in_order == [line.split()[0] for line in case["parameters"]]
    labels = None if case["labels"] is None else torch.tensor(case["labels"])
    x = seeded_normal(name + "/x", (2, 3, 16, 16), SEED)
    with torch.no_grad():
        got = seeded(denoiser)(x, torch.tensor(case["sigma"]), labels)
    assert got.dtype == torch.float32 and relative_error(got, GOLDEN[name]) < 5e-5


@pytest.mark.parametrize(
    "precond, kwargs, count",
    [
        (
            "vp",
            dict(model_type="SongUNet", img_resolution=32, channel_mult=[2, 2, 2], augment_dim=9),
            55_733_891,
        ),
        (
            "ve",
            dict(
                model_type="SongUNet",
                img_resolution=32,
                channel_mult=[2, 2, 2],
                augment_dim=9,
                label_dim=10,
                **NCSN,
            ),
            56_400_643,
        ),
        ("edm", dict(model_type="DhariwalUNet", img_resolution=64, label_dim=1000), 295_899_267),
    ],
)
def test_published_sizes(precond, kwargs, count):
    with torch.device("meta"):
        denoiser = create_edm_denoiser(precond, img_channels=3, **kwargs)
    assert sum(p.numel() for p in denoiser.parameters()) == count


# ---- conditions ----


@BOTH
def test_augment_labels_change_the_output_and_none_stands_for_zeros(cls):
    denoiser, x, sigma = EDMPrecond(small(cls, augment_dim=9)), images(), torch.tensor([0.4, 3.0])
    plain = denoiser(x, sigma)
    assert torch.allclose(denoiser(x, sigma, augment_labels=torch.zeros(2, 9)), plain, atol=1e-6)
    assert not torch.allclose(denoiser(x, sigma, augment_labels=torch.ones(2, 9)), plain, atol=1e-3)


@BOTH
def test_label_dropout_withholds_classes_in_training_only(cls):
    n = 64
    network = small(cls, label_dim=3, label_dropout=0.3, img_resolution=8, attn_resolutions=(4,))
    x, noise = images(1, 8).expand(n, -1, -1, -1), torch.zeros(n)
    labels = F.one_hot(torch.full((n,), 2), 3).float()
    with torch.no_grad():
        shown, withheld = network(x, noise, labels)[:1], network(x, noise, torch.zeros(n, 3))[:1]
        assert torch.allclose(network(x, noise, labels), shown.expand(n, -1, -1, -1), atol=1e-4)
        torch.manual_seed(0)
        mixed = network.train()(x, noise, labels)
    is_shown = (mixed - shown).flatten(1).abs().amax(1) < 1e-4
    is_withheld = (mixed - withheld).flatten(1).abs().amax(1) < 1e-4
    assert (is_shown ^ is_withheld).all()
    assert is_withheld.float().mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / n))


@BOTH
def test_dropout_is_for_training_only(cls):
    network, x = small(cls, dropout=0.5), images()
    assert torch.equal(network(x, NOISE), network(x, NOISE))
    network.train()
    assert not torch.equal(network(x, NOISE), network(x, NOISE))


# ---- training ----


@pytest.mark.parametrize(
    "network",
    [
        lambda: SongUNet(**SMALL),
        lambda: SongUNet(**SMALL, **NCSN),
        lambda: SongUNet(**SMALL, encoder_type="skip", decoder_type="skip"),
        lambda: DhariwalUNet(**SMALL),
    ],
    ids=["ddpmpp", "ncsnpp", "skip", "adm"],
)
@pytest.mark.filterwarnings("ignore:no attention over")
def test_a_fresh_network_says_little_and_learns_at_once(network):
    torch.manual_seed(0)
    denoiser = EDMPrecond(network())
    x = torch.tanh(images(8)) * torch.linspace(-1, 1, 16)
    sigma = torch.linspace(0.2, 1.5, 8)
    noisy = x + sigma.view(-1, 1, 1, 1) * seeded_normal("edm noise", tuple(x.shape))
    weight = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2).view(-1, 1, 1, 1)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        output = denoiser(noisy, sigma)
        loss = (weight * (output - x) ** 2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Silence is a loss near the variance of the network's target: a few tenths to 1.
    silent = (
        (weight * (noisy * (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1) - x) ** 2).mean().item()
    )
    assert losses[0] == pytest.approx(silent, rel=2e-3)
    assert losses[-1] < 0.7 * losses[0]
    assert denoiser.training
    unmoved = [
        name
        for name, p in denoiser.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not unmoved


def test_how_weights_start():
    """SongUNet: Glorot's uniform weights; DhariwalUNet: Kaiming's times sqrt(1/3). What ends a
    branch is almost or exactly 0.
    """
    torch.manual_seed(0)
    kinds = {}
    for cls in (SongUNet, DhariwalUNet):
        model = cls(**{**SMALL, "channel_mult": (2, 4), "label_dim": 30, "augment_dim": 9})
        kinds[cls] = dict(model.named_modules())
        for name, layer in kinds[cls].items():
            if (
                not isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))
                or name == "map_label"
                and cls is DhariwalUNet
            ):
                continue
            pixels, last = layer.weight[0, 0].numel(), name.rpartition(".")[2]
            fan_in, fan_out = pixels * layer.weight.shape[1], pixels * layer.weight.shape[0]
            ends = last in ("conv1", "proj", "out_conv") or last.endswith("aux_conv")
            if cls is SongUNet:
                gain = 1e-5 if ends else math.sqrt(0.2) if last == "qkv" else 1
                bound, bias = gain * math.sqrt(6 / (fan_in + fan_out)), 0
            else:
                bound = bias = 0 if ends or last == "map_augment" else 1 / math.sqrt(fan_in)
            for values, limit in ((layer.weight, bound), (layer.bias, bias)):
                if values is not None:
                    assert values.abs().max() <= limit * (1 + 1e-6), name
                    # With n uniform numbers, the root of their mean square is the limit / sqrt(3)
                    # within a few parts of sqrt(n).
                    rms = values.detach().square().mean().sqrt().item()
                    assert rms == pytest.approx(
                        limit / math.sqrt(3), rel=2 / math.sqrt(values.numel())
                    ), name
    assert kinds[DhariwalUNet]["map_label"].weight.std().item() == pytest.approx(1, abs=0.05)


@BOTH
def test_checkpointed_blocks_have_the_same_gradients(cls):
    stored = small(cls, model_channels=64)
    again = cls(**{**SMALL, "model_channels": 64}, use_checkpoint=True)
    again.load_state_dict(stored.state_dict())
    gradients = []
    for network in (stored, again.eval()):
        network(images(), NOISE).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients))


def test_a_denoiser_can_be_copied_and_reloaded():
    denoiser, other = (
        create_edm_denoiser("iddpm", **TINY).eval(),
        create_edm_denoiser("iddpm", **TINY).eval(),
    )
    with torch.no_grad():
        denoiser.model.out_conv.weight.fill_(0.1)
    other.load_state_dict(copy.deepcopy(denoiser).state_dict())
    assert "u" in denoiser.state_dict() and denoiser.model.out_channels == 6
    x = images(2, 8)
    assert torch.equal(other(x, 1.0), denoiser(x, 1.0)) and not torch.equal(other(x, 1.0), x)


# ---- parts ----


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 2, 5, 5, 2, 1]])
def test_halving_is_the_transpose_of_doubling_and_both_keep_the_mean(taps):
    x, y = seeded_normal("resample x", (2, 3, 12, 8)), seeded_normal("resample y", (2, 3, 6, 4))
    down, up = Resample("down", taps), Resample("up", taps)
    assert down(x).shape == y.shape and up(y).shape == x.shape
    assert (down(x) * y).sum().item() == pytest.approx((x * up(y)).sum().item() / 4, rel=1e-4)
    flat = torch.ones(1, 3, 12, 12)
    margin = len(taps) // 2  # where zeros outside the image are felt
    for resampled in (down(flat), up(flat)):
        inner = resampled[..., margin:-margin, margin:-margin]
        assert torch.allclose(inner, torch.ones_like(inner), atol=1e-6)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_the_box_filter_needs_no_convolution(direction):
    x, kernel = seeded_normal("box", (2, 3, 8, 6)), filter_kernel([1, 1])
    short, long = Resampler(direction, [1, 1]), Resampler(direction, [1, 1])
    assert short.box
    long.box = False
    torch.testing.assert_close(short(x, kernel), long(x, kernel))


def test_convolving_first_is_a_convolution_of_the_plane_and_then_the_filter():
    torch.manual_seed(0)
    first = ResamplingConv2d(3, 4, 3, "down", [1, 3, 3, 1], convolve_first=True)
    x = images()
    plane = F.conv2d(F.pad(x, (8,) * 4), first.weight, first.bias, padding=1)
    want = F.conv2d(
        plane, filter_kernel([1, 3, 3, 1]).expand(4, -1, -1, -1), stride=2, padding=1, groups=4
    )[..., 4:-4, 4:-4]
    torch.testing.assert_close(first(x), want, rtol=1e-4, atol=1e-5)
    last = ResamplingConv2d(3, 4, 3, "down", [1, 3, 3, 1])
    last.load_state_dict(first.state_dict())
    assert last(x).shape == want.shape and not torch.allclose(last(x), want, atol=1e-2)


def test_the_skip_encoder_shows_every_level_the_means_of_the_input():
    network = small(encoder_type="skip", channel_mult=(1, 2, 2))
    seen = {}
    for r in (8, 4):
        network.enc[f"{r}x{r}_aux_skip"].register_forward_pre_hook(
            lambda _, args, r=r: seen.update({r: args[0]})
        )
    x = images()
    network(x, NOISE)
    assert all(torch.allclose(seen[r], F.avg_pool2d(x, 16 // r), atol=1e-6) for r in (8, 4))


def test_the_skip_decoder_adds_up_one_image_per_level():
    network, bias = small(decoder_type="skip", channel_mult=(1, 2, 2)), {4: 1.0, 8: 20.0, 16: 300.0}
    with torch.no_grad():
        for r, value in bias.items():
            network.dec[f"{r}x{r}_aux_conv"].weight.zero_()
            network.dec[f"{r}x{r}_aux_conv"].bias.fill_(value)
        assert torch.equal(network(images(), NOISE), torch.full((2, 3, 16, 16), 321.0))


@BOTH
def test_sinusoids_of_the_noise_level(cls):
    """SongUNet: sines first, the last frequency 1/10000; DhariwalUNet: cosines first, one step
    short of it.
    """
    network, seen = small(cls), []
    network.map_layer0.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    noise = torch.tensor([-0.7, 421.5])
    network(images(), noise)
    i = torch.arange(16, dtype=torch.float64)
    angles = noise.double()[:, None] * 1e4 ** (-i / (15 if cls is SongUNet else 16))
    waves = [angles.sin(), angles.cos()] if cls is SongUNet else [angles.cos(), angles.sin()]
    torch.testing.assert_close(seen[0].double(), torch.cat(waves, 1), rtol=0, atol=5e-5)


def test_attention_is_that_of_the_paper_with_interleaved_queries_keys_and_values():
    block = small(DhariwalUNet, channel_mult=(1, 4)).dec["8x8_in0"]  # two heads of 64
    assert block.num_heads == 2
    x = seeded_normal("attention", (2, 128, 8, 8))
    qkv = F.conv2d(block.norm2(x), block.qkv.weight, block.qkv.bias).reshape(
        2, 2, 64, 3, 64
    )  # n, head, channel, q k v, pixel
    q, k, v = qkv.unbind(3)
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / 8).softmax(-1)
    mixed = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(2, 128, 8, 8)
    torch.testing.assert_close(block._attend(x), x + block.proj(mixed), rtol=1e-4, atol=1e-4)


@BOTH
def test_layout_in_memory_changes_nothing_and_stays(cls):
    network, x = small(cls, channel_mult=(1, 4)), images()
    plain = network(x, NOISE)
    network.to(memory_format=torch.channels_last)
    seen = []
    network.dec["16x16_block0"].register_forward_hook(lambda *args: seen.append(args[2]))
    torch.testing.assert_close(
        network(x.to(memory_format=torch.channels_last), NOISE), plain, rtol=1e-4, atol=1e-4
    )
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_images_of_other_sizes_pass():
    assert small(**NCSN)(seeded_normal("wide", (2, 3, 8, 20)), NOISE).shape == (2, 3, 8, 20)


# ---- what is refused, and what to do ----


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(img_resolution=18, channel_mult=(1, 1, 1)),
            "18 does not fit .* multiples of 4.* 16 or 20",
        ),
        (dict(model_channels=144), "144 channels cannot be normalised in 32 groups"),
        (dict(model_channels=2), "normalised"),
        (dict(label_dropout=1.0), "label_dropout is 1.0: give a probability"),
        (dict(embedding_type="sine"), "embedding_type 'sine': use one of positional, fourier"),
        (dict(encoder_type="res"), "encoder_type 'res': use one of standard, skip, residual"),
        (dict(decoder_type="residual"), "decoder_type 'residual': use one of standard, skip"),
        (
            dict(resample_filter=(1, 2, 1), encoder_type="skip"),
            r"resample_filter is \[1, 2, 1\]: give an even number",
        ),
    ],
)
def test_networks_that_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        SongUNet(**{**SMALL, **changes})


def test_attention_that_has_no_effect_is_told():
    with pytest.warns(UserWarning, match="no attention over 32 channels"):
        DhariwalUNet(**{**SMALL, "channel_mult": (1, 1)})
    with pytest.warns(UserWarning, match=r"attn_resolutions \[5\] names no level"):
        SongUNet(**{**SMALL, "attn_resolutions": [5]})
    with pytest.raises(ValueError, match="224 channels, one head per 64"):
        DhariwalUNet(**{**SMALL, "channel_mult": (2, 7)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DhariwalUNet(**SMALL)


def test_inputs_that_do_not_fit():
    network = small(augment_dim=9)
    for x, noise, more, message in (
        (images(), torch.zeros(3), {}, r"noise_labels have shape \(3,\) for 2 images"),
        (images()[:, :1], NOISE, {}, r"takes \[N, 3, H, W\]"),
        (images()[..., :15], NOISE, {}, "15 does not fit"),
        (
            images(),
            NOISE,
            {"class_labels": torch.zeros(2, 3)},
            "label_dim 0: leave them out, or build it with label_dim",
        ),
        (images(), NOISE, {"augment_labels": torch.zeros(2, 8)}, r"give shape \(2, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            network(x, noise, **more)
    with pytest.raises(
        ValueError, match="augment_dim 0: leave them out, or build it with augment_dim"
    ):
        small()(images(), NOISE, augment_labels=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="label_dim 3: give one-hot rows"):
        small(label_dim=3)(images(), NOISE)
    with pytest.raises(ValueError, match=r"class labels of shape \(2, 4\).* give shape \(2, 3\)"):
        small(label_dim=3)(images(), NOISE, torch.zeros(2, 4))
