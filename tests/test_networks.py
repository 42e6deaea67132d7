"""UNets: the mathematics of their parts, and every option of the whole.

Beside it: test_networks_memory.py (dtype and layout), test_networks_contracts.py (published numbers
and names, sizes, errors).
"""

import pytest
import torch
import torch.nn.functional as F
from golden_tools import load_seeded_weights, seeded_normal

from guided_diffusion_ip.networks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    EncoderUNetModel,
    ResBlock,
    SuperResModel,
    UNetModel,
    Upsample,
    checkpoint,
    normalization,
    scale_module,
    timestep_embedding,
    zero_module,
)
from guided_diffusion_ip.networks.layers import Dropout

SMALL = dict(
    image_size=16,
    in_channels=3,
    model_channels=32,
    out_channels=6,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_head_channels=16,
)
T = torch.tensor([3, 741])


def small(cls=UNetModel, **changes):
    return load_seeded_weights(cls(**{**SMALL, **changes}))


def images(n=2, channels=3, height=16, width=16):
    return seeded_normal("images", (n, channels, height, width))


# Primitives


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_keeps_a_share_and_the_mean_and_sends_back_the_gradient_of_what_it_kept(layout):
    torch.manual_seed(0)
    x = (
        torch.ones(7, 5, 33, 31).to(memory_format=layout).requires_grad_()
    )  # an odd number of elements
    y = Dropout(0.3)(x)
    y.sum().backward()
    n = x.numel()
    assert y.is_contiguous(memory_format=layout) and y.unique().tolist() == pytest.approx(
        [0, 1 / 0.7], rel=1e-4
    )
    assert (y == 0).sum() / n == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / n) ** 0.5)
    assert torch.equal(x.grad, y.detach())
    # Neighbours in memory share a random word: they must not share their fate.
    kept = (
        y.detach().permute(0, 2, 3, 1) if layout == torch.channels_last else y.detach()
    ).flatten() > 0
    for distance in (1, 2, 3, 4):
        together = (kept[:-distance] & kept[distance:]).float().mean()
        assert together == pytest.approx(0.49, abs=0.02)


def test_dropout_at_its_limits_and_when_not_training():
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(Dropout(0.0)(x), x) and torch.equal(Dropout(0.5).eval()(x), x)
    assert not Dropout(1.0)(x).any()
    assert Dropout(0.5)(x).dtype == torch.float64 and Dropout(0.5)(x[:0]).shape == (0, 4, 5, 5)
    strided = Dropout(0.5)(x[:, ::2])
    assert ((strided == 0) | (strided == 2 * x[:, ::2])).all()


def test_group_norm_takes_its_statistics_in_float32_and_keeps_dtype(monkeypatch):
    seen = []
    native = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *more: seen.append(x.dtype) or native(x, *more))
    x = (1000 + 4 * seeded_normal("norm", (2, 32, 8, 8))).half()
    norm = normalization(32)
    exact = native(x.double(), 32, eps=1e-5)
    assert norm(x).dtype == torch.float16 and seen == [torch.float32]
    torch.testing.assert_close(norm(x).double(), exact, rtol=2e-3, atol=2e-3)
    x64 = x.double()
    torch.testing.assert_close(norm.double()(x64), exact, rtol=1e-12, atol=1e-12)


def test_timestep_embedding_is_cosines_then_sines_of_geometric_frequencies():
    t = torch.tensor([0.0, 1.0, 17.5, 999.0])
    emb = timestep_embedding(t, 8, max_period=1e4).double()
    w = 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = t.double()[:, None] * w
    torch.testing.assert_close(emb, torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=2e-5)
    odd = timestep_embedding(t.long(), 9)
    assert odd.shape == (4, 9) and odd.dtype == torch.float32 and not odd[:, -1].any()


def test_scale_and_zero_module_act_in_place():
    conv = torch.nn.Conv2d(3, 4, 3)
    before = conv.weight.detach().clone()
    assert scale_module(conv, 0.5) is conv and torch.equal(conv.weight, before / 2)
    assert zero_module(conv) is conv and not conv.weight.any() and not conv.bias.any()
    assert conv.weight.requires_grad


# Attention against its definition in float64


def explicit_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v with q, k, v [N, h, T, d]."""
    weights = torch.softmax(torch.einsum("nhtd,nhsd->nhts", q, k) / q.shape[-1] ** 0.5, dim=-1)
    return torch.einsum("nhts,nhsd->nhtd", weights, v)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_block_is_softmax_attention(new_order, layout):
    block = AttentionBlock(64, num_heads=4, use_new_attention_order=new_order)
    block = load_seeded_weights(block).double()
    x = seeded_normal("x", (2, 64, 3, 5)).double().contiguous(memory_format=layout)
    flat = F.group_norm(x, 32, block.norm.weight, block.norm.bias).reshape(2, 64, 15)
    qkv = block.qkv(flat)  # the convolution itself, [N, 3 C, T]
    if new_order:
        q, k, v = qkv.reshape(2, 3, 4, 16, 15).unbind(1)
    else:
        q, k, v = qkv.reshape(2, 4, 3, 16, 15).unbind(2)
    heads = explicit_attention(*(z.transpose(2, 3) for z in (q, k, v)))
    want = x + block.proj_out(heads.transpose(2, 3).reshape(2, 64, 15)).reshape(x.shape)
    got = block(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert got.is_contiguous(memory_format=layout)


def test_attention_pool_is_the_first_token_of_full_attention():
    pool = load_seeded_weights(AttentionPool2d((3, 5), 64, 16, output_dim=10)).double()
    x = seeded_normal("x", (2, 64, 3, 5)).double()
    flat = x.reshape(2, 64, 15)
    tokens = torch.cat([flat.mean(2, keepdim=True), flat], 2) + pool.positional_embedding
    q, k, v = pool.qkv_proj(tokens).reshape(2, 3, 4, 16, 16).transpose(3, 4).unbind(1)
    joined = explicit_attention(q, k, v).transpose(2, 3).reshape(2, 64, 16)
    torch.testing.assert_close(pool(x), pool.c_proj(joined)[:, :, 0], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"\(3, 5\), got \(5, 3\)"):
        pool(x.transpose(2, 3))


# Blocks


def test_resampling_repeats_and_averages_pixels():
    x = images()
    up, down = Upsample(3, use_conv=False)(x), Downsample(3, use_conv=False)(x)
    assert torch.equal(up, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(down, x.reshape(2, 3, 8, 2, 8, 2).mean((3, 5)))
    assert Upsample(3, True, out_channels=5)(x).shape == (2, 5, 32, 32)
    assert Downsample(3, True, out_channels=5)(x).shape == (2, 5, 8, 8)
    frames = seeded_normal("frames", (1, 3, 4, 8, 8))
    assert Upsample(3, False, dims=3)(frames).shape == (1, 3, 4, 16, 16)
    assert Downsample(3, False, dims=3)(frames).shape == (1, 3, 4, 4, 4)
    with pytest.raises(ValueError, match="keeps its 3 channels, but out_channels is 5"):
        Upsample(3, use_conv=False, out_channels=5)


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_res_block_resamples_both_paths_before_the_first_convolution(way, scale_shift):
    block = ResBlock(32, 8, 0.0, 64, use_scale_shift_norm=scale_shift, **{way: True})
    block = load_seeded_weights(block)
    x, emb = images(channels=32), seeded_normal("emb", (2, 8))

    def resample(z):
        return F.interpolate(z, scale_factor=2) if way == "up" else F.avg_pool2d(z, 2)

    h = block.in_layers[2](resample(F.silu(block.in_layers[0](x))))
    message = block.emb_layers[1](F.silu(emb))[:, :, None, None]
    if scale_shift:
        h = block.out_layers[0](h) * (1 + message[:, :64]) + message[:, 64:]
    else:
        h = block.out_layers[0](h + message)
    want = block.skip_connection(resample(x)) + block.out_layers[3](F.silu(h))
    torch.testing.assert_close(block(x, emb), want)


def test_new_blocks_are_the_identity_and_a_new_model_predicts_zero():
    x = images(channels=32)
    assert torch.equal(ResBlock(32, 8, 0.0)(x, seeded_normal("emb", (2, 8))), x)
    assert torch.equal(AttentionBlock(32)(x), x)
    assert not UNetModel(**SMALL)(images(), T).any()


# Recomputation


@pytest.mark.parametrize("on", [False, True])
def test_recomputation_reaches_residual_and_attention_blocks_only_when_asked(on, monkeypatch):
    calls = {ResBlock: 0, AttentionBlock: 0}
    for cls in calls:

        def counted(self, *args, cls=cls, inner=cls._residual):
            calls[cls] += 1
            return inner(self, *args)

        monkeypatch.setattr(cls, "_residual", counted)
    model = small(use_checkpoint=on)
    blocks = {cls: sum(isinstance(m, cls) for m in model.modules()) for cls in calls}
    model(images(), T).square().mean().backward()
    assert min(blocks.values()) > 1
    assert calls == {cls: n * (2 if on else 1) for cls, n in blocks.items()}


def test_recomputation_gives_the_same_gradients_dropout_included():
    gradients = []
    for on in (False, True):
        model = small(use_checkpoint=on, dropout=0.5).train()
        x = images().requires_grad_()
        torch.manual_seed(1)
        model(x, T).square().mean().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_checkpoint_takes_the_published_arguments():
    w = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor(2.0, requires_grad=True)
    checkpoint(lambda z: z * w, (x,), [w], True).backward()
    assert (x.grad, w.grad) == (3.0, 2.0)
    with torch.no_grad():
        assert checkpoint(lambda z: z * w, (x,), [w], True) == 6.0


# Whole models


@pytest.mark.parametrize("height, width, channels", [(16, 24, 3), (8, 4, 1), (6, 10, 4)])
def test_any_divisible_size_and_any_number_of_channels(height, width, channels):
    model = small(in_channels=channels, out_channels=channels, image_size=(height, width))
    x = images(2, channels, height, width)
    assert model(x, T).shape == x.shape
    classifier = small(
        EncoderUNetModel, in_channels=channels, image_size=(height, width), pool="attention"
    )
    assert classifier(x, T).shape == (2, 6)


def test_an_image_does_not_depend_on_its_batch():
    model = small(num_classes=10, use_scale_shift_norm=True)
    x, y = images(), torch.tensor([1, 7])
    whole = model(x, T, y)
    parts = [model(x[i : i + 1], T[i : i + 1], y[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x, T[:1], y), model(x, T[[0, 0]], y))


def test_labels_and_timesteps_matter_and_labels_join_the_time_embedding():
    model = small(num_classes=10)
    x, y = images(), torch.tensor([1, 7])
    with torch.no_grad():
        assert not torch.allclose(model(x, T, y), model(x, T, y.flip(0)))
        assert not torch.allclose(model(x, T, y), model(x, T.flip(0), y))
        model.label_emb.weight.zero_()
        unconditional = small()
        unconditional.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(model(x, T, y), unconditional(x, T))


@pytest.mark.parametrize(
    "options",
    [
        dict(resblock_updown=True, use_scale_shift_norm=True),
        dict(conv_resample=False),
        dict(num_head_channels=-1, num_heads=4, num_heads_upsample=2),
        dict(channel_mult=(1, 1.5, 2), model_channels=64),
        dict(attention_resolutions=[]),
        dict(attention_resolutions={1, 2}, use_new_attention_order=True),
    ],
)
def test_every_option_trains(options):
    model = small(dropout=0.1, **options).train()
    model(images(), T).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_decoder_heads_may_differ_from_encoder_heads():
    model = small(num_head_channels=-1, num_heads=4, num_heads_upsample=2)

    def heads(part):
        return {m.num_heads for m in part.modules() if isinstance(m, AttentionBlock)}

    assert heads(model.input_blocks) == heads(model.middle_block) == {4}
    assert heads(model.output_blocks) == {2}


@pytest.mark.parametrize("dims, shape", [(1, (2, 3, 16)), (3, (2, 3, 3, 8, 8))])
def test_one_and_three_spatial_dimensions(dims, shape):
    x = seeded_normal("x", shape)
    assert small(dims=dims)(x, T).shape == (2, 6, *shape[2:])
    assert small(EncoderUNetModel, dims=dims, resblock_updown=True)(x, T).shape == (2, 6)


def test_super_resolution_sees_the_small_image_enlarged():
    model = small(SuperResModel, num_classes=10)
    x, low, y = images(), seeded_normal("low", (2, 3, 4, 8)), torch.tensor([1, 7])
    enlarged = F.interpolate(low, (16, 16), mode="bilinear")
    want = UNetModel.forward(model, torch.cat([x, enlarged], 1), T, y)
    assert torch.equal(model(x, T, low_res=low, y=y), want)


@pytest.mark.parametrize(
    "pool, names",
    [
        ("adaptive", ["0.weight", "0.bias", "3.weight", "3.bias"]),
        (
            "attention",
            [
                "0.weight",
                "0.bias",
                "2.positional_embedding",
                "2.qkv_proj.weight",
                "2.qkv_proj.bias",
                "2.c_proj.weight",
                "2.c_proj.bias",
            ],
        ),
        ("spatial", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("spatial_v2", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
    ],
)
def test_pools(pool, names):
    model = small(EncoderUNetModel, pool=pool, out_channels=7)
    assert [n[4:] for n in model.state_dict() if n.startswith("out.")] == names
    x = images()
    logits = model(x, T)
    assert logits.shape == (2, 7) and not torch.allclose(logits[0], logits[1])
    torch.testing.assert_close(logits[:1], model(x[:1], T[:1]), rtol=1e-4, atol=1e-5)
    if pool.startswith("spatial"):
        # stem 32, level 0: 32, down 32, level 1: 64, middle 64
        assert model.out[0].weight.shape == (2048, 32 + 32 + 32 + 64 + 64)
        states, features = [], []
        for block in (*model.input_blocks, model.middle_block):
            block.register_forward_hook(lambda m, args, out: states.append(out))
        model.out[0].register_forward_hook(lambda m, args, out: features.append(args[0]))
        model(x, T)
        torch.testing.assert_close(features[0], torch.cat([s.mean((2, 3)) for s in states], 1))
