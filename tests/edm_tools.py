"""Small EDM networks that can be made again anywhere, and what to show them."""

import pytest
import torch
from golden_tools import seeded_normal, seeded_weight

from guided_diffusion_ip.networks.edm_unets import DhariwalUNet, SongUNet

SEED = 31
SMALL = dict(
    img_resolution=16,
    in_channels=3,
    out_channels=3,
    model_channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(8,),
    dropout=0.0,
)
NCSN = dict(
    embedding_type="fourier",
    encoder_type="residual",
    channel_mult_noise=2,
    resample_filter=(1, 3, 3, 1),
)
TINY = dict(
    img_resolution=8, model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[]
)
BOTH = pytest.mark.parametrize("cls", [SongUNet, DhariwalUNet])
NOISE = torch.tensor([-0.3, 0.4])


def seeded(model):
    """With seeded parameters; of the buffers, frequencies alone are random."""
    weights = {
        name: seeded_weight(name, tuple(p.shape), SEED) for name, p in model.named_parameters()
    }
    frequencies = {
        name: 16 * seeded_normal(name, tuple(b.shape), SEED)
        for name, b in model.named_buffers()
        if name.endswith("freqs")
    }
    rest = model.load_state_dict({**weights, **frequencies}, strict=False)
    assert not rest.unexpected_keys and all(
        name.endswith("resample_filter") for name in rest.missing_keys
    )
    return model.eval()


def small(cls=SongUNet, **changes):
    return seeded(cls(**{**SMALL, **changes}))


def images(n=2, side=16):
    return seeded_normal("edm images", (n, 3, side, side))
