"""Imagen's dynamic thresholding: what it does to x_0_hat, and that the flag reaches the images."""

import numpy as np
import pytest
import torch
from test_python_api import checkpoint  # noqa: F401 (a fixture)

from guided_diffusion_ip.api import sample, sampling_request
from guided_diffusion_ip.diffusion.dynamic_threshold import dynamic_threshold


def test_each_image_has_its_own_range():
    x = (
        torch.linspace(-1, 1, 101).repeat(3, 1, 1, 1)
        * torch.tensor([0.5, 2, 4])[:, None, None, None]
    )
    got = dynamic_threshold(0.9)(x)
    assert torch.equal(got[0], x[0])  # within [-1, 1] already
    for image, scale in ((1, 2), (2, 4)):
        s = 0.9 * scale
        assert torch.allclose(got[image], x[image].clamp(-s, s) / s, atol=1e-6)
    assert got.abs().max() == 1
    assert torch.allclose(dynamic_threshold(1)(x)[2], x[2] / 4)


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_is_above_0_and_up_to_1(share):
    with pytest.raises(ValueError, match="share of the pixels"):
        dynamic_threshold(share)


@pytest.mark.parametrize("ddim", [False, True])
def test_the_flag_changes_the_images_and_0_does_not(checkpoint, tmp_path, ddim):  # noqa: F811
    def images(name, **flags):
        request = sampling_request(
            model_path=checkpoint,
            num_samples=2,
            timestep_respacing="4",
            use_ddim=ddim,
            out_dir=str(tmp_path / name),
            **flags,
        )
        return np.load(sample(request))["arr_0"], request.identity

    off, off_identity = images("off")
    zero, zero_identity = images("zero", dynamic_threshold=0)
    half, half_identity = images("half", dynamic_threshold=0.5)
    assert (off == zero).all() and off_identity == zero_identity
    assert (off != half).any() and half_identity["dynamic_threshold"] == 0.5


def test_solvers_along_sigma_refuse_it(checkpoint):  # noqa: F811
    with pytest.raises(ValueError, match="goes along sigma"):
        sampling_request(model_path=checkpoint, solver="heun", dynamic_threshold=0.9)
