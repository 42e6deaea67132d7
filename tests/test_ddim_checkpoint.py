"""Checkpoints of DDIM's official code: a network with their names, written here, against what the
converted weights compute.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from golden_tools import load_seeded_weights, seeded_image
from torch import nn

pytest.importorskip("diffusers")

from guided_diffusion_ip.interop.ddim_checkpoint import convert_ddim_state, is_ddim_state  # noqa: E402
from guided_diffusion_ip.interop.diffusers_models import ddpm_unet  # noqa: E402

WIDTH, SIZE = 32, 16


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, before, after, emb):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.temb_proj = nn.Linear(emb, after)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # [N, C, HW]
        weights = torch.softmax(
            q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=2
        )  # [N, query, key]
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next."""

    def __init__(self, widths, after, emb, attends, resample=""):
        super().__init__()
        self.block = nn.ModuleList(Block(before, after, emb) for before in widths)
        self.attn = nn.ModuleList(Attention(after) for _ in widths if attends)
        if resample:
            way = nn.Module()
            way.conv = nn.Conv2d(
                after,
                after,
                3,
                stride=2 if resample == "downsample" else 1,
                padding=0 if resample == "downsample" else 1,
            )
            setattr(self, resample, way)

    def run(self, number, h, emb):
        h = self.block[number](h, emb)
        return self.attn[number](h) if len(self.attn) else h


class Official(nn.Module):
    """DDPM's U-Net (Ho et al. 2020, Appendix B), with the names of ermongroup/ddim."""

    def __init__(self, mult, blocks, attending, channels=3, out_channels=3):
        super().__init__()
        emb, last = 4 * WIDTH, len(mult) - 1
        self.mult, self.blocks = mult, blocks
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(WIDTH, emb), nn.Linear(emb, emb)])
        self.conv_in = nn.Conv2d(channels, WIDTH, 3, padding=1)
        skips, h, self.down = [WIDTH], WIDTH, nn.ModuleList()
        for level, m in enumerate(mult):
            after = m * WIDTH
            self.down.append(
                Level(
                    [h] + [after] * (blocks - 1),
                    after,
                    emb,
                    level in attending,
                    "downsample" if level < last else "",
                )
            )
            skips += [after] * (blocks + (level < last))
            h = after
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = (
            Block(h, h, emb),
            Attention(h),
            Block(h, h, emb),
        )
        ups = []
        for level in range(last, -1, -1):
            after, widths = mult[level] * WIDTH, []
            for _ in range(blocks + 1):
                widths.append(h + skips.pop())
                h = after
            ups.append(Level(widths, after, emb, level in attending, "upsample" if level else ""))
        self.up = nn.ModuleList(reversed(ups))
        self.norm_out, self.conv_out = norm(h), nn.Conv2d(h, out_channels, 3, padding=1)

    def forward(self, x, t):
        half = WIDTH // 2
        angles = t.float()[:, None] * torch.exp(
            torch.arange(half) * (-math.log(10000) / (half - 1))
        )
        emb = self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], dim=1))
        emb = self.temb.dense[1](F.silu(emb))
        states = [self.conv_in(x)]
        for level in self.down:
            for number in range(self.blocks):
                states.append(level.run(number, states[-1], emb))
            if hasattr(level, "downsample"):
                states.append(level.downsample.conv(F.pad(states[-1], (0, 1, 0, 1))))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(states[-1], emb)), emb)
        for level in reversed(self.up):
            for number in range(self.blocks + 1):
                h = level.run(number, torch.cat([h, states.pop()], dim=1), emb)
            if hasattr(level, "upsample"):
                h = level.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))


SHAPES = {
    "cifar": dict(mult=(1, 2, 2), blocks=2, attending=(1,)),
    "one_block": dict(mult=(1, 1, 2, 4), blocks=1, attending=(0, 2)),
    "no_attention": dict(mult=(1, 2), blocks=3, attending=(), channels=1, out_channels=1),
    "learned_variance": dict(mult=(1, 2), blocks=1, attending=(1,), out_channels=6),
}


def official(name):
    return load_seeded_weights(Official(**SHAPES[name]))


def flags_for_factory(flags):
    return {key: value for key, value in flags["model"].items() if key != "framework"}


@pytest.mark.parametrize("name", SHAPES)
def test_the_converted_network_computes_the_same(name):
    reference, channels = official(name), SHAPES[name].get("channels", 3)
    state, flags = convert_ddim_state(reference.state_dict(), image_size=SIZE)
    model = ddpm_unet(**flags_for_factory(flags)).eval()
    model.load_state_dict(state)  # strict: nothing missing, nothing left over
    x, t = seeded_image("x", (3, channels, SIZE, SIZE)), torch.tensor([0, 370, 999])
    with torch.no_grad():
        want, got = reference(x, t), model(x, t)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert flags["diffusion"] == {"diffusion_steps": 1000, "noise_schedule": "linear"}


def test_flags_are_read_off_the_shapes():
    _, flags = convert_ddim_state(official("one_block").state_dict(), image_size=SIZE)
    assert flags["model"] == dict(
        framework="ddpm",
        image_size=16,
        in_channels=3,
        num_channels=32,
        channel_mult="1,1,2,4",
        num_res_blocks=1,
        attention_resolutions="16,4",
        learn_sigma=False,
    )
    assert (
        convert_ddim_state(official("learned_variance").state_dict())[1]["model"]["learn_sigma"]
        is True
    )
    unknown = convert_ddim_state(official("no_attention").state_dict())[1]["model"]
    assert "image_size" not in unknown and "attention_resolutions" not in unknown


def test_without_an_image_size_the_network_attends_at_16_pixels_like_all_published_ones():
    """CIFAR-10 (attention at level 1), CelebA 64 (level 2), LSUN 256 (level 4)."""
    for mult, attending, size in (
        ((1, 2, 2, 2), 1, 32),
        ((1, 2, 2, 2, 4), 2, 64),
        ((1, 1, 2, 2, 4, 4), 4, 256),
    ):
        with torch.device("meta"):
            state = Official(mult, 2, (attending,)).state_dict()
        flags = convert_ddim_state(state)[1]["model"]
        assert (flags["image_size"], flags["attention_resolutions"]) == (size, "16")
        assert flags["channel_mult"] == ",".join(map(str, mult))


def test_averages_and_prefixes():
    reference = official("cifar").state_dict()
    average = {name: value + 1 for name, value in reference.items()}
    content = [
        {f"module.{name}": value for name, value in reference.items()},
        {"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": [{"lr": 2e-4}]},
        3,
        790000,
        average,
    ]
    plain = convert_ddim_state(reference)[0]
    assert (
        is_ddim_state(content)
        and is_ddim_state(reference)
        and not is_ddim_state({"out.2.weight": torch.zeros(1)})
    )
    for ema, shift in ((True, 1), (False, 0)):
        state = convert_ddim_state(content, ema=ema)[0]
        assert state.keys() == plain.keys() and all(
            torch.equal(state[k], plain[k] + shift) for k in plain
        )
    without = convert_ddim_state(content[:4])[0]
    assert all(torch.equal(without[k], plain[k]) for k in plain)


def test_a_file_of_a_run_is_read_without_unpickling(tmp_path):
    from guided_diffusion_ip import dist_util

    model = official("cifar")
    optimizer = torch.optim.Adam(model.parameters())
    path = tmp_path / "ckpt.pth"
    torch.save(
        [model.state_dict(), optimizer.state_dict(), 1, 2, dict(model.named_parameters())], path
    )
    state, _ = convert_ddim_state(dist_util.load_state_dict(path))
    assert torch.equal(state["conv_in.weight"], model.conv_in.weight)


def test_other_files_and_other_networks_are_refused():
    with pytest.raises(ValueError, match="not a checkpoint of DDIM's official code"):
        convert_ddim_state({"out.2.weight": torch.zeros(1)})
    state = official("cifar").state_dict()
    with pytest.raises(
        ValueError, match=r"down.0.block.0.conv_shortcut.weight \[1\] has no counterpart"
    ):
        convert_ddim_state({**state, "down.0.block.0.conv_shortcut.weight": torch.zeros(1)})
    with torch.device("meta"):
        wide = Official((2, 2), 1, ()).state_dict()
    with pytest.raises(ValueError, match="first level has 2 times the channels"):
        convert_ddim_state(wide)
