"""Chains that start below the last step of a process: which steps they take, and how it is asked for."""

import numpy as np
import pytest
import torch

from guided_diffusion_ip.diffusion.respace import space_timesteps
from guided_diffusion_ip.runs.sample_batch import process_sampler
from guided_diffusion_ip.script_util import create_gaussian_diffusion
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.identity import deciding_values
from guided_diffusion_ip.settings.lambda_file import check_origin, write_schedule
from guided_diffusion_ip.settings.solver import number_of_steps, settle_sampler
from guided_diffusion_ip.studies.sweep import _steps


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3@10", {0, 5, 10}),
        ("ddim4@11", {0, 3, 6, 9}),
        ("2,3@9", {0, 4, 5, 7, 9}),
        ("@4", {0, 1, 2, 3, 4}),
        ("10@960", set(round(k * 960 / 9) for k in range(10))),
    ],
)
def test_the_steps_up_to_the_start_are_respaced(text, expected):
    assert space_timesteps(1000, text) == expected


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("3@", "starts at nothing: chains can start at a step from 1 to 99, such as 10@96"),
        ("3@0", "starts at 0"),
        ("3@100", "starts at 100"),
        ("3@x", "starts at x"),
        ("12@10", "asks for 12 steps in a section of 11"),
    ],
)
def test_starts_that_there_are_not(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        space_timesteps(100, text)


def test_starting_at_the_last_step_is_the_published_chain():
    assert space_timesteps(1000, "25@999") == space_timesteps(1000, "25")


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "time_shift"])
def test_every_solver_starts_there_from_pure_noise(solver):
    process = create_gaussian_diffusion(steps=1000, timestep_respacing="4@960")
    seen = []

    def model(x, t):
        seen.append((int(t[0]), float(x.std())))
        return x

    options = {"time_shift_window": 0} if solver == "time_shift" else {}
    sampler = process_sampler(process, (1, 16, 16), solver=solver)
    sampler = sampler if not options else type(sampler)(**{**vars(sampler), "options": options})
    images = sampler(model, [0, 1])
    assert [t for t, _ in seen] == [960, 640, 320, 0] and images.shape == (2, 1, 16, 16)
    assert seen[0][1] == pytest.approx(1, abs=0.1)


def settled(*argv, script="image_sample"):
    return settle_sampler(parse(script, "", [*argv]))


def test_the_flag_is_the_respacing_with_a_start():
    by_flag = settled("--timestep_respacing", "10", "--t_start", "960", "--use_ddim", "True")
    by_text = settled("--timestep_respacing", "10@960", "--use_ddim", "True")
    plain = settled("--timestep_respacing", "10", "--use_ddim", "True")
    assert deciding_values(by_flag) == deciding_values(by_text) != deciding_values(plain)
    assert number_of_steps(by_flag) == 10 and number_of_steps(settled("--t_start", "499")) == 500
    assert "t_start" not in deciding_values(plain)


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--solver", "heun", "--t_start", "900"], "--sigma_max says where it starts"),
        (["--timestep_respacing", "10@900", "--t_start", "960"], "says already where chains start"),
        (["--t_start", "1000"], "a step from 1 to 999"),
        (["--timestep_respacing", "50", "--t_start", "20"], "50 steps in a section of 21"),
    ],
)
def test_starts_that_cannot_be_are_refused(argv, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        settled(*argv)
    assert "\n" not in str(error.value)


def test_a_lambda_belongs_to_its_start(tmp_path):
    path = tmp_path / "eps.yaml"
    made = {"use_ddim": True, "eta": 0.0, "diffusion_steps": 1000, "timestep_respacing": "10@960"}
    write_schedule(path, {"b": 1.01, "settings": made})
    wanted = {**made, "model_sha256": ""}
    assert check_origin(path, "ddim", wanted) == []
    for other in ("10", "10@900"):
        with pytest.raises(ValueError, match="calibrated for --timestep_respacing 10@960"):
            check_origin(path, "ddim", {**wanted, "timestep_respacing": other})


def test_sweeps_take_it_as_a_number_of_steps():
    assert _steps("10@960") == "10@960" and _steps("ddim10@960") == "ddim10@960"
    for wrong in ("@960", "10@", "10@0"):
        with pytest.raises(ValueError):
            _steps(wrong)


def test_ddim_on_a_cosine_schedule_gains_by_it():
    """Gaussian data, exact network, images that are clipped: the variance of finished samples."""
    stds = {}
    for respacing in ("10", "10@960"):
        process = create_gaussian_diffusion(
            steps=1000, noise_schedule="cosine", timestep_respacing=respacing
        )
        whole = torch.from_numpy(process.whole().alphas_cumprod).float()

        def exact(x, t, whole=whole):
            ab = whole[t].view(-1, 1, 1, 1)
            return (1 - ab).sqrt() * x / (ab * 0.09 + 1 - ab)

        images = process_sampler(process, (1, 32, 32), solver="ddim")(exact, range(20))
        stds[respacing] = float(images.std())
    off = {respacing: abs(np.log(std / 0.3)) for respacing, std in stds.items()}
    assert off["10@960"] < off["10"], stds
