"""What a bare checkpoint's names and shapes say about its architecture, for every published
configuration.
"""

from pathlib import Path

import pytest
import torch

from guided_diffusion_ip import script_util
from guided_diffusion_ip.interop.adm_checkpoint import infer_architecture
from guided_diffusion_ip.networks.unet import default_channel_mult, parse_channel_mult
from guided_diffusion_ip.settings.config import parse

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
OPENAI = {
    "openai256_uncond": dict(
        image_size=256,
        num_channels=256,
        num_res_blocks=2,
        num_head_channels=64,
        learn_sigma=True,
        attention_resolutions="32,16,8",
        resblock_updown=True,
        class_cond=False,
    ),
    "openai512": dict(
        image_size=512,
        num_channels=256,
        num_res_blocks=2,
        num_head_channels=64,
        learn_sigma=True,
        attention_resolutions="32,16,8",
        resblock_updown=True,
        class_cond=True,
    ),
    "plain_convolutions": dict(
        image_size=32,
        num_channels=64,
        num_res_blocks=2,
        attention_resolutions="16",
        in_channels=1,
        use_scale_shift_norm=False,
        class_cond=False,
    ),
    "one_level": dict(
        image_size=16,
        num_channels=32,
        num_res_blocks=2,
        channel_mult="2",
        attention_resolutions="16",
        class_cond=False,
    ),
    "given_mult": dict(
        image_size=16,
        num_channels=64,
        num_res_blocks=1,
        channel_mult="0.5,1,3",
        resblock_updown=True,
        attention_resolutions="8",
        class_cond=True,
        num_classes=7,
    ),
}


def model_flags(name):
    if name in OPENAI:
        return {**parse("image_train", "", []).section("model"), **OPENAI[name]}
    return parse("image_train", "", ["--config", str(CONFIGS / f"{name}.yaml")]).section("model")


ADM = [
    path.stem
    for path in sorted(CONFIGS.glob("*.yaml"))
    if model_flags(path.stem)["framework"] == "adm"
]


@pytest.mark.parametrize("name", [*OPENAI, *ADM])
def test_the_architecture_is_read_off_the_shapes(name):
    flags = model_flags(name)
    with torch.device("meta"):
        state = script_util.create_model_and_diffusion(**flags)[0].state_dict()
    size = script_util.parse_image_size(flags["image_size"])
    found = infer_architecture(state, min(size))
    mult = (
        parse_channel_mult(flags["channel_mult"])
        if flags["channel_mult"]
        else default_channel_mult(size)
    )
    assert parse_channel_mult(found.pop("channel_mult")) == mult
    attended = {min(size) >> level for level in range(len(mult))} & {
        int(r) for r in flags["attention_resolutions"].split(",")
    }
    assert {int(r) for r in found.pop("attention_resolutions").split(",") if r} == attended
    assert found.pop("super_resolution") is False
    assert found and {key: flags[key] for key in found} == found


def test_another_network_is_not_mistaken_for_one():
    assert infer_architecture(torch.nn.Linear(2, 2).state_dict()) == {}
