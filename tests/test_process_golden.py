"""The process against numbers that the published implementation gave for the same inputs."""

import json

import numpy as np
import pytest
import torch
from golden_tools import DATA, relative_error, seeded_image, seeded_normal

from guided_diffusion_ip.script_util import create_gaussian_diffusion

GOLDEN = np.load(DATA / "process_golden.npz")
CASES = json.loads(GOLDEN["cases"].tobytes())
TABLES = (
    "betas",
    "alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


class Toy(torch.nn.Module):
    """tanh(W x + sin(t / 100) / 10), W mixing channels: smooth, bounded, and cheap."""

    def __init__(self, channels_out):
        super().__init__()
        self.w = torch.nn.Parameter(seeded_normal("toy/w", (channels_out, 3)) / 2)

    def forward(self, x, t):
        shift = 0.1 * torch.sin(t.float() / 100).view(-1, 1, 1, 1)
        return torch.tanh(torch.einsum("oc,nchw->nohw", self.w, x) + shift)


def process(kwargs):
    names = {"gamma": "input_perturbation", "b": "eps_scaler", "k": "eps_scaler_k"}
    skip = ("method", "eta", "num_timesteps", "timestep_map")
    return create_gaussian_diffusion(
        **{names.get(k, k): v for k, v in kwargs.items() if k not in skip}
    )


def toy_for(kwargs):
    return Toy(6 if kwargs.get("learn_sigma") else 3)


def numbered(prefix):
    """A randn_like whose n-th call gives the golden run's n-th draw."""
    count = iter(range(1, 10**6))
    return lambda x: seeded_normal(f"{prefix}/z{next(count)}", tuple(x.shape))


@pytest.mark.parametrize("i", range(len(CASES["schedules"])))
def test_tables(i):
    case = CASES["schedules"][i]
    d = process({k: v for k, v in case.items() if k not in ("num_timesteps", "timestep_map")})
    assert d.num_timesteps == case["num_timesteps"]
    if case["timestep_map"]:
        assert d.timestep_map == case["timestep_map"]
    stride = 1 if d.num_timesteps < 200 else 13
    for name in TABLES:
        np.testing.assert_allclose(
            getattr(d, name)[::stride], GOLDEN[f"schedules/{i}/{name}"], rtol=1e-10, atol=1e-300
        )


@pytest.mark.filterwarnings("ignore:input perturbation is meant for")
@pytest.mark.parametrize("i", range(len(CASES["losses"])))
def test_losses_and_their_gradients(i):
    case = CASES["losses"][i]
    d, toy = process(case["kwargs"]), toy_for(case["kwargs"])
    shape = (6, 3, 8, 8)
    terms = d.training_losses(
        toy,
        seeded_image(f"losses/{i}/x0", shape),
        torch.tensor(case["t"]),
        noise=seeded_normal(f"losses/{i}/noise", shape),
        randn_like=lambda z: seeded_normal(f"losses/{i}/xi", tuple(z.shape)),
    )
    assert set(terms) == set(case["terms"])
    for name in case["terms"]:
        assert relative_error(terms[name], GOLDEN[f"losses/{i}/{name}"]) < 2e-5
    terms["loss"].mean().backward()
    assert relative_error(toy.w.grad, GOLDEN[f"losses/{i}/grad_w"]) < 2e-5


@pytest.mark.parametrize("i", range(len(CASES["sampling"])))
def test_samples(i):
    kwargs = CASES["sampling"][i]["kwargs"]
    d, toy = process(kwargs), toy_for(kwargs)
    shape = (3, 3, 8, 8)
    loop = d.p_sample_loop if kwargs["method"] == "ddpm" else d.ddim_sample_loop
    out = loop(
        toy,
        shape,
        noise=seeded_normal(f"sampling/{i}/xT", shape),
        randn_like=numbered(f"sampling/{i}"),
    )
    assert relative_error(out, GOLDEN[f"sampling/{i}"]) < 2e-5


def test_likelihood():
    d = process(
        {"steps": 1000, "noise_schedule": "cosine", "timestep_respacing": "8", "learn_sigma": True}
    )
    result = d.calc_bpd_loop(
        Toy(6), seeded_image("bpd/x0", (2, 3, 8, 8)), randn_like=numbered("bpd")
    )
    for name in ("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"):
        assert relative_error(result[name], GOLDEN[f"bpd/{name}"]) < 2e-5
