"""diffusers' networks behind the adapter: outputs, names, gradients; then training, measuring and
latents with our process.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_tools import load_seeded_weights, seeded_image, seeded_normal
from launch import ROOT

pytest.importorskip("diffusers")

from guided_diffusion_ip import logger  # noqa: E402
from guided_diffusion_ip.exposure_bias.measures import measure  # noqa: E402
from guided_diffusion_ip.exposure_bias.walks import Batch  # noqa: E402
from guided_diffusion_ip.interop.diffusers_models import DiffusersModel, ddpm_unet, import_diffusers  # noqa: E402
from guided_diffusion_ip.runs.sample_batch import process_sampler  # noqa: E402
from guided_diffusion_ip.script_util import (  # noqa: E402
    create_gaussian_diffusion,
    create_model_and_diffusion,
    parameter_count,
)
from guided_diffusion_ip.settings.config import parse  # noqa: E402
from guided_diffusion_ip.training.settings import TrainSettings  # noqa: E402
from guided_diffusion_ip.training.stopping import Limits  # noqa: E402
from guided_diffusion_ip.training.train_loop import TrainLoop  # noqa: E402

diffusers = import_diffusers()
SIZE = 8
T = torch.tensor([3, 700])


def small_unet(channels=3, out_channels=None, **config):
    """UNet2DModel with seeded weights, eval."""
    unet = diffusers.UNet2DModel(
        **{
            **dict(
                sample_size=SIZE,
                in_channels=channels,
                out_channels=out_channels or channels,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=8,
                attention_head_dim=8,
            ),
            **config,
        }
    )
    return load_seeded_weights(unet)


def small_text_unet():
    return load_seeded_weights(
        diffusers.UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            cross_attention_dim=12,
        )
    )


def small_dit(classes=5):
    return load_seeded_weights(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=SIZE,
            patch_size=2,
            num_embeds_ada_norm=classes,
        )
    )


def small_vae(codes=16):
    return load_seeded_weights(
        diffusers.VQModel(
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            latent_channels=3,
            norm_num_groups=8,
            num_vq_embeddings=codes,
            sample_size=2 * SIZE,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )


def tiny_ddpm(**flags):
    return ddpm_unet(
        **{
            **dict(
                image_size=SIZE,
                num_channels=32,
                channel_mult="1,1",
                num_res_blocks=1,
                attention_resolutions="4",
            ),
            **flags,
        }
    )


@torch.no_grad()
def call(model, *args, **kwargs):
    return model(*args, **kwargs)


@pytest.mark.parametrize("t", [T, T.float(), T[:1], T[0]])
def test_the_adapter_returns_what_the_network_returns(t):
    unet, x = small_unet(out_channels=6), seeded_image("x", (2, 3, SIZE, SIZE))
    want = call(unet, x, t.expand(2)).sample
    assert want.shape == (2, 6, SIZE, SIZE) and want.std() > 0.1
    torch.testing.assert_close(call(DiffusersModel(unet), x, t), want, rtol=0, atol=0)


def test_labels_and_text_reach_the_network():
    x, y = seeded_image("x", (2, 3, SIZE, SIZE)), torch.tensor([4, 0])
    unet = small_unet(num_class_embeds=5)
    model = DiffusersModel(unet)
    assert model.num_classes == 5
    assert torch.equal(call(model, x, T, y), call(unet, x, T, class_labels=y).sample)
    assert not torch.equal(call(model, x, T, y), call(model, x, T, y.flip(0)))

    latents, text = seeded_image("x", (2, 4, SIZE, SIZE)), seeded_normal("text", (2, 7, 12))
    unet = small_text_unet()
    model = DiffusersModel(unet)
    assert torch.equal(
        call(model, latents, T, encoder_hidden_states=text), call(unet, latents, T, text).sample
    )
    mask = torch.tensor([[1.0] * 7, [1.0] * 3 + [0.0] * 4])
    masked = call(model, latents, T, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert torch.equal(masked[0], call(model, latents, T, encoder_hidden_states=text)[0])
    assert not torch.equal(masked[1], call(model, latents, T, encoder_hidden_states=text)[1])

    dit = small_dit()
    model = DiffusersModel(dit)
    assert model.num_classes == 6, "five classes and none"
    y = torch.tensor([1, 5])
    assert torch.equal(call(model, latents, T, y), call(dit, latents, T, y).sample)


def test_wrong_input_is_answered_in_one_line():
    x, y = torch.zeros(2, 3, SIZE, SIZE), torch.tensor([0, 5])
    model, labelled, text = (
        DiffusersModel(small_unet()),
        DiffusersModel(small_unet(num_class_embeds=5)),
        small_text_unet(),
    )
    for wrong, message in (
        (lambda: model(x, T, y), "unconditional: leave y out"),
        (lambda: labelled(x, T), "pass y"),
        (lambda: labelled(x, T, y), "range from 0 to 5: this network knows 0 to 4"),
        (lambda: model(x[:, :2], T), r"takes \[N, 3, H, W\]"),
        (lambda: model(x, torch.arange(3)), "one per image"),
        (lambda: model(x, T, encoder_hidden_states=x), "looks at no text"),
        (
            lambda: DiffusersModel(text)(torch.zeros(2, 4, SIZE, SIZE), T),
            "pass encoder_hidden_states",
        ),
        (lambda: DiffusersModel(torch.nn.Linear(1, 1)), "got a Linear"),
        (lambda: tiny_ddpm(num_channels=48), "multiple of 32"),
        (lambda: tiny_ddpm(channel_mult="2,2"), "start with 1"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_names_and_weights_are_the_wrapped_networks(tmp_path):
    unet = small_unet()
    model = DiffusersModel(unet)
    assert list(model.state_dict()) == list(unet.state_dict())
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in unet.named_parameters()
    ]
    with torch.no_grad():
        model.conv_in.weight.zero_()
    assert not unet.conv_in.weight.any()
    unet.save_pretrained(tmp_path)
    again = DiffusersModel(diffusers.UNet2DModel.from_pretrained(tmp_path))
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_copies_and_other_weights():
    """What EMA and previews do: call the network with other weights than its own."""
    x = seeded_image("x", (2, 3, SIZE, SIZE))
    model = DiffusersModel(small_unet())
    before, other = call(model, x, T), copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    assert torch.equal(call(model, x, T), before) and not torch.equal(call(other, x, T), before)
    with torch.no_grad():
        swapped = torch.func.functional_call(model, dict(other.named_parameters()), (x, T))
    assert torch.equal(swapped, call(other, x, T)) and torch.equal(call(model, x, T), before)


def test_modes_and_gradients_pass_through():
    torch.manual_seed(0)
    x = seeded_image("x", (2, 3, SIZE, SIZE))
    model = DiffusersModel(small_unet(dropout=0.5))
    assert torch.equal(model(x, T), model(x, T))
    model.train()
    assert model.unet.training and not torch.equal(model(x, T), model(x, T))
    model(x, T).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1
    )
    assert not model.eval().unet.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = seeded_image("x", (2, 3, SIZE, SIZE))
    model = DiffusersModel(small_unet())
    want = call(model, x, T)
    with torch.autocast("cpu", dtype):
        assert (call(model, x, T) - want).abs().max() < 0.15 * want.std()
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    got = call(model, x, T.float())
    assert got.dtype == torch.float32 and 0 < (got - want).abs().max() < 0.05 * want.std()
    model.convert_to_fp32()
    assert model.dtype == torch.float32


def test_ddpm_unet_is_the_published_cifar_10_network():
    with torch.device("meta"):
        model = ddpm_unet(32, 3, 128, "1,2,2,2", 2, "16", 0.1)
        assert parameter_count(model) == 35_746_307
        default = ddpm_unet(image_size=32)
        assert parameter_count(default) == 35_746_307
        assert parameter_count(
            ddpm_unet(32, learn_sigma=True, class_cond=True, num_classes=10, null_class=True)
        ) == (35_746_307 + 3 * (128 * 9 + 1) + 11 * 512)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.1}, (
        "attention has none"
    )
    assert (model.in_channels, model.image_size, model.num_classes) == (3, 32, None)


def test_the_config_describes_it_and_how_it_was_trained():
    path = str(Path(__file__).resolve().parent.parent / "configs" / "ddim_cifar10.yaml")
    cfg, sampling = (
        parse("image_train", "", ["--config", path]),
        parse("image_sample", "", ["--config", path]),
    )
    with torch.device("meta"):
        model, process = create_model_and_diffusion(
            **cfg.section("model"), **cfg.section("diffusion")
        )
    assert isinstance(model, DiffusersModel) and parameter_count(model) == 35_746_307
    assert [process.betas[0], process.betas[-1], process.num_timesteps] == pytest.approx(
        [1e-4, 0.02, 1000]
    )
    assert (cfg.lr, cfg.global_batch_size, cfg.ema_rate, cfg.dropout, cfg.input_perturbation) == (
        2e-4,
        128,
        "0.9999",
        0.1,
        0,
    )
    assert (sampling.use_ddim, sampling.timestep_respacing, sampling.clip_denoised) == (
        True,
        "ddim100",
        False,
    )
    # Table 5 of arXiv 2301.11706.
    assert [
        list(cfg.paper[f"fid_{name}"].values())
        for name in ("ddim", "ddim_ip", "ddim_eta_0.5", "ddim_ip_eta_0.5")
    ] == [
        [14.21, 7.5, 5.17, 4.66, 4.29],
        [10.54, 5.7, 4.66, 4.52, 4.27],
        [17.24, 8.87, 5.59, 4.88, 4.45],
        [10.06, 5.53, 3.95, 3.66, 3.56],
    ]


def test_recomputation_changes_nothing():
    x = seeded_image("x", (2, 3, SIZE, SIZE))
    plain, saving = (
        load_seeded_weights(tiny_ddpm(use_checkpoint=value)).train() for value in (False, True)
    )
    assert saving.use_checkpoint
    gradients = []
    for model in (plain, saving):
        model(x, T).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_training_losses_with_gamma():
    model, x = (
        load_seeded_weights(tiny_ddpm(learn_sigma=True)),
        seeded_image("images", (4, 3, SIZE, SIZE)),
    )
    diffusion = create_gaussian_diffusion(learn_sigma=True, rescale_learned_sigmas=True)
    t, noise = torch.tensor([5, 200, 600, 950]), seeded_normal("noise", (4, 3, SIZE, SIZE))
    losses = {}
    for gamma in (0.0, 0.15):
        torch.manual_seed(1)
        losses[gamma] = diffusion.training_losses(model, x, t, noise=noise, gamma=gamma)["loss"]
    assert (losses[0.0] != losses[0.15]).all()
    losses[0.15].mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("labels", [False, True])
def test_the_loop_learns(tmp_path, labels):
    logger.configure(str(tmp_path), format_strs=["csv"])
    torch.manual_seed(0)
    model = tiny_ddpm(class_cond=labels, num_classes=3)
    diffusion = create_gaussian_diffusion(steps=100, input_perturbation=0.1)
    images, y = seeded_image("bright", (8, 3, 1, 1)).expand(8, 3, SIZE, SIZE), torch.arange(8) % 3

    def data():
        while True:
            yield images, {"y": y} if labels else {}

    settings = TrainSettings(
        batch_size=8,
        microbatch=4,
        lr=2e-3,
        ema_rates=(0.9,),
        log_interval=20,
        limits=Limits(max_steps=60),
    )
    loop = TrainLoop(model, diffusion, data(), settings)
    loop.run_loop()
    rows = (tmp_path / "progress.csv").read_text().splitlines()
    column = rows[0].split(",").index("mse")
    losses = [float(row.split(",")[column]) for row in rows[1:]]
    assert losses[-1] < 0.5 * losses[0], losses
    saved = torch.load(tmp_path / "ema_0.9_000060.pt", weights_only=True)
    diffusers_own = model.unet.load_state_dict(saved)
    assert not diffusers_own.missing_keys and not diffusers_own.unexpected_keys


def test_exposure_bias_is_measured():
    model = load_seeded_weights(tiny_ddpm())
    diffusion = create_gaussian_diffusion(timestep_respacing="4", eps_scaler=1.01)
    images = seeded_image("images", (6, 3, SIZE, SIZE))
    batches = [Batch(range(i, i + 3), images[i : i + 3], {}) for i in (0, 3)]
    found = measure(
        ["norm", "delta", "variance"], process_sampler(diffusion, (3, SIZE, SIZE)), model, batches
    )
    assert found["norm"]["ratio"].shape == (4,) and np.isfinite(found["norm"]["ratio"]).all()
    assert (found["delta"]["delta_multi"] >= 0).all() and np.isfinite(found["variance"]["final"])


def test_latents_through_our_process():
    """Encode, train and sample in the latent space with gamma and lambda, decode."""
    vae, model = small_vae(), DiffusersModel(small_unet())
    images = seeded_image("images", (2, 3, 2 * SIZE, 2 * SIZE))
    with torch.no_grad():
        latents = vae.encode(images).latents
    assert latents.shape == (2, 3, SIZE, SIZE)
    losses = create_gaussian_diffusion(input_perturbation=0.1).training_losses(model, latents, T)
    assert losses["loss"].shape == (2,) and torch.isfinite(losses["loss"]).all()

    decoded = {}
    for b in (1.0, 1.01):
        diffusion = create_gaussian_diffusion(timestep_respacing="ddim5", eps_scaler=b)
        # Latents are not confined to [-1, 1].
        sample = diffusion.ddim_sample_loop(
            model,
            (2, 3, SIZE, SIZE),
            noise=seeded_normal("start", (2, 3, SIZE, SIZE)),
            clip_denoised=False,
        )
        with torch.no_grad():
            decoded[b] = vae.decode(sample).sample
    assert decoded[1.0].shape == (2, 3, 2 * SIZE, 2 * SIZE) and torch.isfinite(decoded[1.01]).all()
    assert not torch.equal(decoded[1.0], decoded[1.01])


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_importing_us_does_not_import_diffusers():
    code = (
        "import sys, guided_diffusion_ip.script_util, "
        "guided_diffusion_ip.interop.diffusers_models as m, "
        "guided_diffusion_ip.interop.diffusers_schedulers, "
        "guided_diffusion_ip.interop.ddim_checkpoint\nsys.exit('diffusers' in sys.modules)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_torchvision_that_does_not_load_is_no_hindrance(tmp_path):
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = (
        "from guided_diffusion_ip.interop.diffusers_models import ddpm_unet\n"
        "print(type(ddpm_unet(8, 3, 32, '1,1', 1, '')).__name__)"
    )
    done = run_python(code, PYTHONPATH=str(tmp_path))
    assert done.stdout == "DiffusersModel\n", done.stderr


SNIPPETS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(), re.DOTALL
)
# Imported when it is called, since the snippet itself has to import diffusers first.
TINY_PIPELINE = """
def tiny_pipeline():
    from test_diffusers_models import diffusers, small_dit
    from golden_tools import load_seeded_weights
    vae = load_seeded_weights(diffusers.AutoencoderKL(
        block_out_channels=(16, 32), latent_channels=4, norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2))
    return diffusers.DiTPipeline(small_dit(1000), vae, diffusers.DDIMScheduler())
"""


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_snippets_of_the_document_run_beside_a_torchvision_that_does_not_load(number, tmp_path):
    """As they stand there, but for the download of three gigabytes."""
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = re.sub(
        r"(diffusers\.)?DiTPipeline\.from_pretrained\([^)]*\)", "tiny_pipeline()", SNIPPETS[number]
    )
    done = run_python(
        TINY_PIPELINE + code,
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "tests"), str(ROOT)]),
    )
    assert done.returncode == 0, done.stderr


def test_the_document_has_its_snippets():
    assert (
        len(SNIPPETS) == 3 and "tiny" not in "".join(SNIPPETS) and "from_pretrained" in SNIPPETS[0]
    )


def test_a_missing_library_is_named_with_its_extra():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from guided_diffusion_ip.interop.diffusers_models import ddpm_unet\n"
        "try: ddpm_unet(32)\n"
        "except ValueError as error: print(error)"
    )
    done = run_python(code)
    assert "pip install -e '.[diffusers]'" in done.stdout and done.stdout.count("\n") == 1, (
        done.stderr
    )
