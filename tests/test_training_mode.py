"""Sampling from a network that was left in training mode: one warning, from every verb, and only
where dropout is active.
"""

import re
import warnings
from pathlib import Path

import pytest
import torch

from guided_diffusion_ip.diffusion.denoiser import BoundDenoiser
from guided_diffusion_ip.diffusion.edm_sampling import (
    ablation_sample,
    ablation_sample_progressive,
    edm_sample,
    edm_sample_progressive,
)
from guided_diffusion_ip.diffusion.guidance import classifier_free
from guided_diffusion_ip.diffusion.process_denoiser import ProcessDenoiser
from guided_diffusion_ip.script_util import create_edm_denoiser, create_model_and_diffusion

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (2, 1, 8, 8)
ADM = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1",
    attention_resolutions="",
    timestep_respacing="3",
)
EDM = dict(
    img_resolution=8,
    img_channels=1,
    model_type="DhariwalUNet",
    model_channels=32,
    channel_mult=[1],
    num_blocks=1,
    attn_resolutions=[],
)


def adm(dropout, **more):
    model, process = create_model_and_diffusion(**ADM, dropout=dropout, **more)
    return model.train(), process


def verbs(model, process, denoiser):
    """Every sampling verb by name, each to be called once."""
    noise = torch.zeros(SHAPE)
    return {
        "p_sample_loop": lambda: process.p_sample_loop(model, SHAPE),
        "p_sample_loop_progressive": lambda: list(process.p_sample_loop_progressive(model, SHAPE)),
        "ddim_sample_loop": lambda: process.ddim_sample_loop(model, SHAPE),
        "ddim_sample_loop_progressive": lambda: list(
            process.ddim_sample_loop_progressive(model, SHAPE)
        ),
        "edm_sample": lambda: edm_sample(denoiser, noise, num_steps=2),
        "edm_sample_progressive": lambda: list(
            edm_sample_progressive(denoiser, noise, num_steps=2)
        ),
        "ablation_sample": lambda: ablation_sample(denoiser, noise, num_steps=2),
        "ablation_sample_progressive": lambda: list(
            ablation_sample_progressive(denoiser, noise, num_steps=2)
        ),
    }


def said(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in seen if "training mode" in str(one.message)]


@pytest.mark.parametrize("name", verbs(None, None, None))
def test_every_verb_warns_once(name):
    def call(dropout, training=True):
        model, process = adm(dropout)
        denoiser = create_edm_denoiser("EDMPrecond", dropout=dropout, **EDM)
        model.train(training), denoiser.train(training)
        return said(verbs(model, process, denoiser)[name])

    found = call(0.1)
    assert len(found) == 1 and "dropout is active" in found[0] and "model.eval()" in found[0]
    assert not call(0.1, training=False) and not call(0.0)


def test_wrapped_networks_are_looked_into():
    model, process = adm(0.1, class_cond=True, num_classes=3, null_class=True)
    guided, y = classifier_free(model, 2.0, null_label=3), torch.zeros(2, dtype=torch.int64)
    assert len(said(lambda: process.p_sample_loop(guided, SHAPE, model_kwargs={"y": y}))) == 1
    noise = torch.zeros(SHAPE)
    assert (
        len(said(lambda: edm_sample(ProcessDenoiser(process, model), noise, y, num_steps=2))) == 1
    )
    denoiser = create_edm_denoiser("EDMPrecond", label_dim=3, dropout=0, label_dropout=0.1, **EDM)
    assert (
        len(said(lambda: edm_sample(BoundDenoiser(denoiser, denoiser), noise, y, num_steps=2))) == 1
    ), "labels are dropped"
    model.eval(), denoiser.eval()
    assert not said(lambda: process.p_sample_loop(guided, SHAPE, model_kwargs={"y": y}))
    assert not said(lambda: edm_sample(denoiser, noise, y, num_steps=2))
    assert not said(lambda: process.p_sample_loop(lambda x, t: torch.zeros_like(x), SHAPE))


def test_the_readme_samples_without_dropout():
    code = re.search(
        r"In Python:\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    assert "training_losses" in code and 0 < code.index("model.eval()") < code.index(
        "p_sample_loop"
    )
