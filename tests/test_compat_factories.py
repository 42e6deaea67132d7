"""guided_diffusion's factories and blocks as people introspect, patch, override and hook them: one
small case per behaviour.
"""

import argparse
import inspect
import json

import pytest
import torch
from golden_tools import DATA
from torch import nn

from guided_diffusion_ip import compat, networks
from guided_diffusion_ip import script_util as ours

API = json.loads((DATA / "published_api.json").read_text())["script_util"]
# Of the IP paper's code, not of guided-diffusion's.
NEW = {"input_pertub", "eps_scaler", "eps_scaler_k", "num_classes"}
TINY = dict(
    image_size=8,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    diffusion_steps=20,
    noise_schedule="cosine",
)
CLASSIFIER = dict(
    image_size=8,
    classifier_width=64,
    classifier_depth=1,
    classifier_attention_resolutions="4",
    noise_schedule="cosine",
)
SR = dict(large_size=32, small_size=8, num_channels=32, num_res_blocks=1)


@pytest.fixture(scope="module", autouse=True)
def installed():
    import sys

    before = list(sys.path)
    compat.install()
    yield
    sys.path[:] = before


@pytest.fixture
def su(monkeypatch):
    from guided_diffusion import script_util

    monkeypatch.setattr(script_util, "NUM_CLASSES", 1000)
    return script_util


@pytest.fixture
def unet():
    from guided_diffusion import unet

    return unet


def disturbed(model):
    """Weights that are not zero anywhere, from a seed."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


def call(model, **cond):
    torch.manual_seed(6)
    return model(torch.randn(2, 3, 8, 8), torch.tensor([3, 7]), **cond)


# ---- factories: signatures ----

FACTORIES = {
    "create_model_and_diffusion": TINY,
    "sr_create_model_and_diffusion": SR,
    "create_classifier_and_diffusion": CLASSIFIER,
}


@pytest.mark.parametrize(
    "name", [name for name in API if name.startswith(("create_", "sr_create_"))]
)
def test_getfullargspec_shows_the_published_flags_in_their_order(su, name):
    spec = inspect.getfullargspec(getattr(su, name))
    published = [p for p in API[name] if p not in (*NEW, "*")]
    if "*" in API[name]:
        assert spec.args == [] and set(published) <= set(spec.kwonlyargs)
    else:
        assert spec.args == published


@pytest.mark.parametrize("name, small", FACTORIES.items())
def test_flags_chosen_by_getfullargspec_reach_the_factory(su, name, small):
    known = inspect.getfullargspec(getattr(su, name))[0]
    config = {**getattr(su, DEFAULTS[name])(), **small, "something_else": 1}
    model, process = getattr(su, name)(**{key: config[key] for key in known})
    by_position, _ = getattr(su, name)(*(config[key] for key in known))
    assert ours.parameter_count(model) == ours.parameter_count(by_position) < 20e6
    assert process.num_timesteps == config["diffusion_steps"]


@pytest.mark.parametrize("name, small", FACTORIES.items())
def test_networks_are_those_of_the_core(su, name, small):
    torch.manual_seed(0)
    theirs, process = getattr(su, name)(**small)
    torch.manual_seed(0)
    core, core_process = getattr(ours, name)(**small)
    assert [(k, v.shape) for k, v in theirs.state_dict().items()] == [
        (k, v.shape) for k, v in core.state_dict().items()
    ]
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), core.parameters()))
    assert (process.betas == core_process.betas).all()


def test_an_unknown_flag_is_an_error(su):
    with pytest.raises(TypeError, match="unknown flag 'num_chanels'.*num_channels"):
        su.create_model_and_diffusion(num_chanels=3)


# ---- factories: what may be replaced ----


def test_create_model_may_be_replaced(su, monkeypatch):
    own, seen = su.create_model, {}

    def create_model(*args, **kwargs):
        seen.update(kwargs, args=args)
        return own(*args, **kwargs)

    monkeypatch.setattr(su, "create_model", create_model)
    flags = {**su.model_and_diffusion_defaults(), **TINY, "eps_scaler": 1.0, "num_classes": 1000}
    su.create_model_and_diffusion(**flags)
    assert seen.pop("args") == (8, 32, 1) and set(seen) <= set(API["create_model"])
    assert seen["channel_mult"] == "1,1"


@pytest.mark.parametrize(
    "name, factory",
    [
        ("sr_create_model", "sr_create_model_and_diffusion"),
        ("create_classifier", "create_classifier_and_diffusion"),
        ("create_gaussian_diffusion", "create_model_and_diffusion"),
    ],
)
def test_other_factories_may_be_replaced(su, monkeypatch, name, factory):
    def replacement(*args, **kwargs):
        assert set(kwargs) <= set(API[name])
        return "mine"

    monkeypatch.setattr(su, name, replacement)
    assert "mine" in getattr(su, factory)(**FACTORIES[factory])


@pytest.mark.parametrize(
    "name, make",
    [
        ("UNetModel", lambda su: su.create_model(8, 32, 1)),
        ("SuperResModel", lambda su: su.sr_create_model_and_diffusion(**SR)[0]),
        ("EncoderUNetModel", lambda su: su.create_classifier_and_diffusion(**CLASSIFIER)[0]),
        ("SpacedDiffusion", lambda su: su.create_gaussian_diffusion(steps=30)),
    ],
)
def test_classes_may_be_replaced(su, monkeypatch, name, make):
    own = type("Own", (getattr(su, name),), {})
    monkeypatch.setattr(su, name, own)
    assert type(make(su)) is own


def test_the_beta_schedule_may_be_replaced(su, monkeypatch):
    from guided_diffusion import gaussian_diffusion

    monkeypatch.setattr(
        gaussian_diffusion, "get_named_beta_schedule", lambda name, steps: [0.25] * steps
    )
    betas = su.create_model_and_diffusion(**TINY)[1].betas
    assert betas == pytest.approx([0.25] * 20)


# ---- defaults and flags ----

DEFAULTS = {
    "create_model_and_diffusion": "model_and_diffusion_defaults",
    "sr_create_model_and_diffusion": "sr_model_and_diffusion_defaults",
    "create_classifier_and_diffusion": "classifier_and_diffusion_defaults",
}


@pytest.mark.parametrize("factory, name", DEFAULTS.items())
def test_defaults_have_the_published_keys(su, factory, name):
    assert set(getattr(su, name)()) == set(API[factory]) - NEW


def test_a_settings_class_of_ones_own_is_enough(su):
    class Args:
        pass

    for name, value in {**su.model_and_diffusion_defaults(), **TINY}.items():
        setattr(Args, name, value)
    flags = su.args_to_dict(Args(), su.model_and_diffusion_defaults().keys())
    assert set(flags) == set(su.model_and_diffusion_defaults())
    su.create_model_and_diffusion(**flags)


def parse(su, words, own=(), defaults="model_and_diffusion_defaults"):
    """What a script's parser and args_to_dict make of a command line."""
    table = dict(own)
    table.update(getattr(su, defaults)())
    parser = argparse.ArgumentParser()
    su.add_dict_to_argparser(parser, table)
    args = parser.parse_args([*words.split(), *_words(TINY, table)])
    return args, su.args_to_dict(args, getattr(su, defaults)().keys())


def _words(small, table):
    return [word for k, v in small.items() if k in table for word in (f"--{k}", str(v))]


def test_new_flags_reach_the_process(su):
    args, flags = parse(su, "--eps_scaler 1.1 --eps_scaler_k 0.001 --input_pertub 0.15")
    process = su.create_model_and_diffusion(**flags)[1]
    assert process.input_pertub == args.input_pertub == 0.15
    assert process.lambdas[:2] == pytest.approx([1.1, 1.101])
    _, flags = parse(su, "")
    assert set(flags) == set(su.model_and_diffusion_defaults()), "none that was not given"


def test_a_scripts_own_input_pertub_reaches_the_process(su):
    _, flags = parse(su, "--input_pertub 0.1", own={"input_pertub": 0.0})
    assert su.create_model_and_diffusion(**flags)[1].input_pertub == 0.1


def test_num_classes_given_to_a_script_without_that_flag(su):
    args, flags = parse(su, "--num_classes 12 --class_cond True")
    assert args.num_classes == su.NUM_CLASSES == 12
    assert su.create_model_and_diffusion(**flags)[0].num_classes == 12


@pytest.mark.parametrize("words, classes", [("", 10), ("--num_classes 7", 7)])
def test_a_scripts_own_num_classes_is_left_alone(su, words, classes):
    args, flags = parse(su, words, own={"num_classes": 10})
    assert args.num_classes == classes and "num_classes" not in flags
    assert su.NUM_CLASSES == 1000


def test_an_option_that_a_script_adds_later_takes_the_place_of_ours(su):
    parser = argparse.ArgumentParser()
    su.add_dict_to_argparser(parser, su.model_and_diffusion_defaults())
    parser.add_argument("--num_classes", type=str, default="ten")
    assert parser.parse_args([]).num_classes == "ten"


def test_other_dictionaries_get_no_flags(su):
    parser = argparse.ArgumentParser()
    su.add_dict_to_argparser(parser, {"lr": 1e-4, "use": True, "name": None})
    assert vars(parser.parse_args(["--use", "no"])) == {"lr": 1e-4, "use": False, "name": None}
    assert su.args_to_dict(argparse.Namespace(a=1, eps_scaler=2.0), ["a"]) == {"a": 1}


# ---- blocks ----

VARIANTS = [
    {},
    {"use_new_attention_order": True, "num_head_channels": 16},
    {"resblock_updown": True, "use_scale_shift_norm": False, "use_checkpoint": True},
    {"learn_sigma": True, "class_cond": True},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_equal_the_cores(su, unet, variant):
    flags = {**TINY, **variant}
    cond = {"y": torch.tensor([1, 2])} if variant.get("class_cond") else {}
    results = []
    for factory in (su.create_model_and_diffusion, ours.create_model_and_diffusion):
        torch.manual_seed(0)
        model = disturbed(factory(**flags)[0])
        out = call(model, **cond)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_three_networks_are_made_of_the_modules_blocks(su, unet):
    for model in (
        su.create_model_and_diffusion(**TINY)[0],
        su.sr_create_model_and_diffusion(**SR)[0],
        su.create_classifier_and_diffusion(**CLASSIFIER)[0],
    ):
        for ours_, theirs in (
            (networks.ResBlock, unet.ResBlock),
            (networks.AttentionBlock, unet.AttentionBlock),
            (networks.Downsample, unet.Downsample),
            (networks.Upsample, unet.Upsample),
        ):
            assert all(
                isinstance(module, theirs)
                for name, module in model.named_modules()
                if isinstance(module, ours_) and not name.endswith(".resample")
            )
        assert any(isinstance(m, unet.AttentionBlock) for m in model.modules())
    assert issubclass(unet.SuperResModel, unet.UNetModel)
    assert issubclass(unet.UNetModel, networks.UNetModel)


@pytest.mark.parametrize("block", ["ResBlock", "AttentionBlock"])
def test__forward_may_be_overridden(su, unet, monkeypatch, block):
    model = disturbed(su.create_model_and_diffusion(**TINY)[0])
    before, own, count = call(model), getattr(unet, block)._forward, []

    def counting(self, *args):
        count.append(self)
        return 2 * own(self, *args)

    monkeypatch.setattr(getattr(unet, block), "_forward", counting)
    assert not torch.allclose(call(model), before)
    assert set(count) == {m for m in model.modules() if isinstance(m, getattr(unet, block))}


@pytest.mark.parametrize(
    "name", ["ResBlock", "AttentionBlock", "Upsample", "Downsample", "QKVAttentionLegacy"]
)
def test_blocks_may_be_replaced_before_a_network_is_built(su, unet, monkeypatch, name):
    own = type("Own", (getattr(unet, name),), {})
    monkeypatch.setattr(unet, name, own)
    model = su.create_model(8, 32, 1, channel_mult="1,1", attention_resolutions="4")
    assert any(type(m) is own for m in model.modules())


def test_a_resblocks_body_may_be_written_in_its_published_parts(unet):
    block = disturbed(unet.ResBlock(32, 8, 0.0, out_channels=64, up=True))

    class Own(unet.ResBlock):
        def _forward(self, x, emb):
            assert self.updown and self.out_channels == 64 and not self.use_scale_shift_norm
            first, last = self.in_layers[:-1], self.in_layers[-1]
            h = last(self.h_upd(first(x))) + self.emb_layers(emb)[..., None, None]
            return self.skip_connection(self.x_upd(x)) + self.out_layers(h)

    own = Own(32, 8, 0.0, out_channels=64, up=True)
    own.load_state_dict(block.state_dict())
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    torch.testing.assert_close(own(x, emb), block(x, emb))


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_is_a_module_to_hook_or_replace(unet, new_order):
    block = disturbed(unet.AttentionBlock(32, num_heads=4, use_new_attention_order=new_order))
    assert type(block.attention) is (unet.QKVAttention if new_order else unet.QKVAttentionLegacy)
    assert list(block.state_dict()) == list(networks.AttentionBlock(32).state_dict())
    x, seen = torch.randn(2, 32, 4, 4), {}
    for name in ("norm", "qkv", "attention", "proj_out"):
        getattr(block, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: tuple(out.shape)})
        )
    before = block(x)
    assert seen == {
        "norm": (2, 32, 4, 4),
        "qkv": (2, 96, 16),
        "attention": (2, 32, 16),
        "proj_out": (2, 32, 16),
    }

    class Nothing(nn.Module):
        def forward(self, qkv):
            return qkv[:, :32] * 0

    block.attention = Nothing()
    after = block(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, x + block.proj_out.bias[:, None, None])


@pytest.mark.parametrize("name", ["QKVAttention", "QKVAttentionLegacy"])
def test_qkv_attention_is_softmax_attention(unet, name):
    heads, d = 2, 4
    qkv = torch.randn(3, 3 * heads * d, 5)
    if name == "QKVAttention":
        q, k, v = qkv.view(3, 3, heads, d, 5).unbind(1)
    else:
        q, k, v = qkv.view(3, heads, 3, d, 5).unbind(2)
    weights = (torch.einsum("nhdt,nhds->nhts", q, k) / d**0.5).softmax(-1)
    wanted = torch.einsum("nhts,nhds->nhdt", weights, v).flatten(1, 2)
    attention = getattr(unet, name)(heads)
    torch.testing.assert_close(attention(qkv), wanted)
    with pytest.raises(ValueError, match="24 channels: 5 heads need a multiple of 15"):
        getattr(unet, name)(5)(qkv)
    attention.total_ops = torch.zeros(1, dtype=torch.float64)
    attention.count_flops(attention, None, wanted)
    assert float(attention.total_ops) == 2 * 3 * 8 * 5**2


def test_the_time_embedding_may_be_replaced(su, unet, monkeypatch):
    model = disturbed(su.create_model_and_diffusion(**TINY)[0])
    monkeypatch.setattr(unet, "timestep_embedding", lambda t, dim: torch.zeros(len(t), dim))
    a = model(torch.ones(2, 3, 8, 8), torch.tensor([0, 9]))
    torch.testing.assert_close(a[0], a[1])


def test_attributes_of_networks_and_blocks(su, unet):
    model = su.create_model_and_diffusion(**TINY, num_heads=2, dropout=0.1)[0]
    assert (model.image_size, model.in_channels, model.model_channels) == (8, 3, 32)
    assert (model.num_res_blocks, model.dropout, model.channel_mult) == (1, 0.1, (1, 1))
    assert (model.num_heads, model.num_head_channels, model.num_heads_upsample) == (2, -1, 2)
    assert 2 in model.attention_resolutions and model.conv_resample and not model.use_checkpoint
    up = unet.Upsample(32, True)
    assert (up.channels, up.out_channels, up.use_conv, up.dims) == (32, 32, True, 2)


def test_half_precision_goes_there_and_back(su):
    model = su.create_model_and_diffusion(**TINY)[0]
    model.convert_to_fp16()
    middle = model.middle_block[1]
    assert middle.qkv.weight.dtype == torch.float16 and model.dtype == torch.float16
    model.convert_to_fp32()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["UNetModel", "EncoderUNetModel"])
def test_networks_have_the_published_signature(unet, name):
    published = json.loads((DATA / "published_api.json").read_text())["unet"][name]["__init__"]
    assert inspect.getfullargspec(getattr(unet, name).__init__).args == published
