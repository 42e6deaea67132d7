"""A run that was begun by an earlier version of this library goes on as if nothing had changed.

data/old_run.zip holds the checkpoint of step 5 that commit dfd35b4 wrote, whose TrainLoop took 32
arguments, and what its run came to, uninterrupted, after 20 steps.
"""

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion_ip import logger
from guided_diffusion_ip.compat import train_util
from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.script_util import create_gaussian_diffusion
from guided_diffusion_ip.training.checkpoint import SavePolicy
from guided_diffusion_ip.training.hooks import Hook
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.stopping import Limits
from guided_diffusion_ip.training.timestep_samplers import create_named_schedule_sampler
from guided_diffusion_ip.training.train_loop import TrainLoop

OLD = Path(__file__).parent / "data" / "old_run.zip"
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
RECORD = {"train": {"lr": 1e-2, "seed": 3, "grad_clip": 0.5}, "diffusion": {"diffusion_steps": 20}}


class Net(torch.nn.Module):
    """128 numbers, the same wherever the test runs."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.time = torch.nn.Linear(1, 4)
        self.last = torch.nn.Conv2d(4, 1, 3, padding=1)
        with torch.no_grad():
            for k, p in enumerate(self.parameters()):
                p.copy_(torch.linspace(-0.3, 0.4, p.numel()).roll(k).reshape(p.shape))

    def forward(self, x, t):
        h = self.first(x) + self.time(t[:, None] / 20)[:, :, None, None]
        return self.last(torch.nn.functional.silu(h))


def images(folder):
    np.savez(folder / "images.npz", arr_0=PIXELS)
    return load_data(
        data_dir=folder / "images.npz", batch_size=6, image_size=8, channels=1, num_workers=0
    )


def score(network, step):
    return {"score": step / 7}


def our_loop(process, data, resume):
    settings = TrainSettings(
        batch_size=6,
        microbatch=4,
        lr=1e-2,
        weight_decay=0.01,
        lr_warmup_steps=8,
        grad_clip=0.5,
        ema_rates=(0.5, 0.9),
        ema_warmup=True,
        seed=3,
        log_interval=7,
        limits=Limits(max_steps=20),
        saving=SavePolicy(5),
        resume=resume,
        record=RECORD,
    )
    sampler = create_named_schedule_sampler("loss-second-moment", process)
    return TrainLoop(
        Net(), process, data, settings, schedule_sampler=sampler, hooks=[Hook(3, score)]
    )


def drop_in_loop(process, data, resume):
    return train_util.TrainLoop(
        model=Net(),
        diffusion=process,
        data=data,
        batch_size=6,
        microbatch=4,
        lr=1e-2,
        weight_decay=0.01,
        lr_warmup_steps=8,
        grad_clip=0.5,
        ema_rate="0.5,0.9",
        ema_warmup=True,
        seed=3,
        log_interval=7,
        max_steps=20,
        save_interval=5,
        resume_checkpoint=resume,
        settings=RECORD,
        schedule_sampler=create_named_schedule_sampler("loss-second-moment", process),
        eval_interval=3,
        evaluate=score,
    )


@pytest.mark.parametrize("make", [our_loop, drop_in_loop])
def test_a_run_of_an_earlier_version_goes_on(make, tmp_path):
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(tmp_path)
    expected = json.loads((tmp_path / "expected.json").read_text())
    logger.configure(str(tmp_path), format_strs=["csv"])
    process = create_gaussian_diffusion(steps=20, noise_schedule="cosine", input_perturbation=0.1)
    loop = make(process, images(tmp_path), str(tmp_path / "model000005.pt"))
    assert loop.step + getattr(loop, "resume_step", 0) == 5
    loop.run_loop()
    logger.reset()
    for part in ("model", "ema_0.5_", "ema_0.9_"):
        saved = torch.load(tmp_path / f"{part}000020.pt", weights_only=True)
        got = saved["last.weight"].flatten().numpy()
        np.testing.assert_allclose(got, expected[part], rtol=1e-4, atol=1e-6, err_msg=part)
    with open(tmp_path / "progress.csv", newline="") as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    for step in ("7", "20"):  # 7: with the unfinished means of steps 2 to 5
        for name, value in expected[f"row {step}"].items():
            assert float(rows[step][name]) == pytest.approx(value, rel=1e-4), (step, name)


def test_what_it_did_not_do_is_refused(tmp_path):
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(tmp_path)
    process = create_gaussian_diffusion(steps=21, noise_schedule="cosine")
    with pytest.raises(ValueError, match="history of"):
        our_loop(process, images(tmp_path), str(tmp_path / "model000005.pt"))
