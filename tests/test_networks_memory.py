"""UNets in memory: which dtype and which layout every tensor has."""

import pytest
import torch
import torch.nn.functional as F
from golden_tools import load_seeded_weights, seeded_normal
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion_ip.networks import (
    AttentionBlock,
    EncoderUNetModel,
    GroupNorm32,
    SuperResModel,
    UNetModel,
)
from guided_diffusion_ip.networks.attention import attend

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d)
T = torch.tensor([3, 741])


def small(cls=UNetModel, **changes):
    options = dict(
        image_size=16,
        in_channels=3,
        model_channels=32,
        out_channels=6,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_head_channels=16,
    )
    return load_seeded_weights(cls(**{**options, **changes}))


def images(n=2, channels=3, height=16, width=16):
    return seeded_normal("images", (n, channels, height, width))


# Layout


@pytest.mark.parametrize(
    "shape, layout",
    [((2, 32, 4, 6), torch.channels_last), ((2, 32, 3, 4, 6), torch.channels_last_3d)],
)
def test_group_norm_keeps_the_layout_even_if_the_kernel_does_not(shape, layout, monkeypatch):
    native = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda *args: native(*args).contiguous())  # as on CUDA
    x = seeded_normal("layout", shape)
    norm = GroupNorm32(32, 32)
    assert norm(x).is_contiguous()
    y = norm(x.contiguous(memory_format=layout))
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, norm(x))


class Copies(TorchDispatchMode):
    """Collects the operations that copy or move a whole feature map or its tokens."""

    KINDS = (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.KINDS and args[0].ndim > 2:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_copies_nothing_in_channels_last(new_order):
    block = AttentionBlock(64, num_heads=4, use_new_attention_order=new_order)
    x = seeded_normal("x", (2, 64, 4, 4)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Copies() as copies:
        block(x)
    assert copies.seen == []


@pytest.mark.parametrize("cls", [UNetModel, EncoderUNetModel, SuperResModel])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(resblock_updown=True, use_scale_shift_norm=True, use_new_attention_order=True),
        dict(conv_resample=False),
    ],
)
def test_a_channels_last_model_stays_channels_last(cls, options):
    model, x = small(cls, **options), images()
    more = {"low_res": images(height=8, width=8)} if cls is SuperResModel else {}
    want = model(x, T, **more)
    model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    more = {n: z.contiguous(memory_format=torch.channels_last) for n, z in more.items()}
    strayed, seen = [], 0

    def watch(name):
        def hook(module, args, out):
            nonlocal seen
            if out.ndim == 4 and out.shape[2] > 1:
                seen += 1
                if not out.is_contiguous(memory_format=torch.channels_last):
                    strayed.append(name)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(watch(name))
    with torch.no_grad(), Copies() as copies:
        got = model(x, T, **more)
    assert not strayed and seen > 50
    assert copies.seen == []
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_contiguous_images_stay_contiguous():
    model = small()
    outputs = []
    for module in model.modules():
        if isinstance(module, (AttentionBlock, GroupNorm32)):
            module.register_forward_hook(lambda m, args, out: outputs.append(out))
    model(images(), T)
    assert outputs and all(out.is_contiguous() for out in outputs)


# Precision


@pytest.mark.parametrize("cls", [UNetModel, EncoderUNetModel, SuperResModel])
def test_convert_to_fp16_and_back(cls):
    model = small(cls, use_scale_shift_norm=True)
    more = {"low_res": images(height=8, width=8)} if cls is SuperResModel else {}
    full = model(images(), T, **more)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    convolutions = {name for name, m in model.named_modules() if isinstance(m, CONVOLUTIONS)}
    for name, value in model.state_dict().items():
        inside = name.split(".")[0] in ("input_blocks", "middle_block", "output_blocks")
        halved = inside and name.rpartition(".")[0] in convolutions
        assert value.dtype == (torch.float16 if halved else torch.float32), name
    half = model(images(), T, **more)
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() / full.norm() < 1e-2
    model.convert_to_fp32()
    assert model.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_moved_to_another_dtype_computes_there(dtype):
    full, x = small()(images(), T), images().to(dtype)
    got = small().to(dtype)(x, T)
    assert got.dtype == dtype
    assert (got - full).norm() / full.norm() < (1e-5 if dtype == torch.float64 else 5e-2)


def test_images_of_another_dtype_are_welcome_and_set_the_dtype_of_the_answer():
    assert small()(images().double(), T).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small()(images(), T).dtype == torch.float32


AUTOCAST = [
    (UNetModel, {}, {}),
    (UNetModel, {"use_scale_shift_norm": True, "num_classes": 5}, {"y": torch.tensor([1, 4])}),
    (SuperResModel, {}, {"low_res": seeded_normal("low", (2, 3, 8, 8))}),
    *[
        (EncoderUNetModel, {"pool": pool}, {})
        for pool in ("adaptive", "attention", "spatial", "spatial_v2")
    ],
]


@pytest.mark.parametrize("cls, options, cond", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_halves_what_a_conversion_halves_and_no_more(dtype, cls, options, cond):
    """Embeddings and heads stay float32: module by module the same formats, and so the
    same answer.
    """
    answers, formats = [], []
    for convert in (True, False):
        model, seen = small(cls, **options), {}
        if convert:
            model.convert_to_fp16() if dtype is torch.float16 else model.convert_to_bf16()
        for name, module in model.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm)):
                module.register_forward_hook(
                    lambda module, x, y, name=name: seen.update({name: y.dtype})
                )
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=not convert):
            answers.append(model(images(), T, **cond))
        formats.append(seen)
    assert formats[0] == formats[1] and set(formats[0].values()) == {dtype, torch.float32}
    assert {formats[1]["time_embed.0"], formats[1]["input_blocks.1.0.emb_layers.1"]} == {
        torch.float32
    }
    distance = (answers[0] - answers[1]).norm() / answers[0].norm()
    assert (
        distance == 0 if dtype is torch.bfloat16 else distance < 2e-3
    )  # a CPU's fp16 kernels differ by the copy of their weights
    assert not torch.equal(answers[1], answers[1].to(dtype).float()), "rounded on the way out"


def test_compiled_networks_are_one_graph_under_autocast():
    model = small()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(images(), T), model(images(), T))


# The paths that a CPU takes in bf16


@pytest.mark.parametrize("tokens", [16, 64, 1100])  # by products; by the fused kernel
def test_attention_in_bf16_on_a_cpu_has_the_gradients_of_exact_attention(tokens):
    exact = [seeded_normal(name, (2, 3, tokens, 8)).double().requires_grad_() for name in "qkv"]
    rough = [z.detach().bfloat16().requires_grad_() for z in exact]
    seed = seeded_normal("gradient", (2, tokens, 24)).double()
    answers = []
    for (q, k, v), g in ((exact, seed), (rough, seed.bfloat16())):
        y = attend(q, k, v)
        y.backward(g)
        answers.append([y.detach(), q.grad, k.grad, v.grad])
    for want, got in zip(*answers):
        assert got.dtype is torch.bfloat16
        assert (got - want).norm() < 2e-2 * want.norm()


@pytest.mark.parametrize(
    "side", [8, 32]
)  # below, and from the size on where the norm makes no wide copy
def test_group_norm_in_bf16_without_gradients_is_bitwise_the_one_with_them(side):
    norm, x = (
        GroupNorm32(32, 64),
        images(channels=64, height=side, width=side)
        .bfloat16()
        .to(memory_format=torch.channels_last),
    )
    with_gradients = norm(x).detach()
    with torch.no_grad():
        y = norm(x)
    assert torch.equal(y, with_gradients) and y.is_contiguous(memory_format=torch.channels_last)
