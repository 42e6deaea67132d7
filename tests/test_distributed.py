"""Two real processes, under mpiexec and under torchrun, against one with the same global batch."""

import os
import shutil
import sys
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from test_resume import same

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--image_size",
    "8",
    "--in_channels",
    "1",
    "--num_channels",
    "32",
    "--num_res_blocks",
    "1",
    "--channel_mult",
    "1,1",
    "--attention_resolutions",
    "4",
    "--learn_sigma",
    "True",
    "--noise_schedule",
    "cosine",
    "--num_head_channels",
    "32",
    "--rescale_learned_sigmas",
    "True",
]
STEPS = 4

LOOP = (
    """
import hashlib, os, sys, torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from guided_diffusion_ip import dist_util, logger
from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.script_util import create_model_and_diffusion
from guided_diffusion_ip.training.timestep_samplers import create_named_schedule_sampler
from guided_diffusion_ip.compat import train_util
from guided_diffusion_ip.training.hooks import Hook
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.stopping import Limits
from guided_diffusion_ip.training.train_loop import TrainLoop

images, out, batch, microbatch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
dist_util.setup_dist()
rank = dist_util.get_rank()
logger.configure(out, ["csv", "stdout"], rank=rank)
torch.manual_seed(rank)  # different on purpose: the loop must bring the ranks together
# 64 channels: with 32, each norm group is one channel, biases before it have gradient 0, and Adam steps along its rounding.
model, diffusion = create_model_and_diffusion(
    image_size=8, in_channels=1, num_channels=64, num_res_blocks=1, channel_mult="1,1", attention_resolutions="4",
    learn_sigma=True, noise_schedule="cosine", num_head_channels=32, rescale_learned_sigmas=True, input_perturbation=0.1)
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.02 * torch.randn(p.shape))
data = load_data(data_dir=images, batch_size=batch, image_size=8, channels=1)
resume, sampler = os.environ.get(f"RESUME{rank}", ""), create_named_schedule_sampler("loss-second-moment", diffusion)
if os.environ.get("DROP_IN"):
    loop = train_util.TrainLoop(
        model=model, diffusion=diffusion, data=data, batch_size=batch, microbatch=microbatch, lr=1e-4, ema_rate="0.9",
        log_interval=1, save_interval=10**6, resume_checkpoint=resume, schedule_sampler=sampler)
else:
    settings = TrainSettings(batch_size=batch, microbatch=microbatch, lr=1e-4, ema_rates=(0.9,), log_interval=1,
                             resume=resume, limits=Limits(%d))
    loop = TrainLoop(model, diffusion, data, settings, schedule_sampler=sampler)
"""
    % STEPS
)
TRAIN = (
    LOOP
    + """
gradients, reduced = [], [[]]
step = loop.precision.step
loop.precision.step = lambda opt: (gradients.append([p.grad.clone() for p in model.parameters()]), reduced.append([]), step(opt))
if sys.argv[5:] == ["count"]:
    assert loop.gradients.network.broadcast_buffers is False
    loop.gradients.network.register_comm_hook(None, lambda group, bucket: (reduced[-1].append(bucket.index()),
                                                                   allreduce_hook(group, bucket))[1])
loop.run_loop()
torch.save({"weights": [p.detach() for p in model.parameters()], "first_gradient": gradients[0],
            "sampler": loop.schedule_sampler.state_dict(), "reduced": reduced[:-1]}, f"{out}/rank{rank}.pt")
dist_util.cleanup()
"""
)
PREVIEWS = """
import numpy as np
from guided_diffusion_ip.training.preview import Preview

class Sampler:  # image 5, which is rank 1's, has a NaN in the first picture
    image_shape, rounded = (1, 8, 8), False
    def __call__(self, model, index, kwargs, device):
        images = torch.zeros(len(index), 1, 8, 8)
        images[np.array(index) == 5, 0, 3] = float("nan") if loop.step == 1 else 0
        return images

def preview(model, step):
    return Preview(Sampler(), 6, out if step != 2 else f"{out}/rank0.txt/x", 2)(model, step)

open(f"{out}/rank0.txt", "w").close()
loop.hooks, loop.last_step = [Hook(1, preview)], 3
"""
RESUMED = (
    LOOP
    + """
torch.save({"model": model.state_dict(), "ema_0.9_": loop.emas[0].state_dict(), "opt": loop.opt.state_dict()},
           f"{out}/rank{rank}.pt")
dist_util.cleanup()
"""
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def one_run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    check(launch.run([sys.executable, "-c", TRAIN, images, str(out), "8", "-1"]))
    return out


@pytest.fixture(scope="module")
def one_process(one_run):
    return load(one_run, 0)


def load(folder, rank):
    return torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True)


def check(done):
    assert done.returncode == 0, done.stdout + done.stderr


def relative(a, b):
    a, b = (torch.cat([x.double().flatten() for x in xs]) for xs in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("microbatch", [-1, 3])
@pytest.mark.parametrize("launcher", [launch.mpiexec, launch.torchrun])
def test_two_processes_train_as_one(launcher, microbatch, images, one_process, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    check(launcher(2, [str(script), images, str(tmp_path), "4", str(microbatch)]))
    first, second = load(tmp_path, 0), load(tmp_path, 1)
    for name in ("weights", "first_gradient"):
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name])), (
            f"{name} differ between ranks"
        )
        assert relative(first[name], one_process[name]) < 1e-5, name
    assert torch.equal(first["sampler"]["seen"], second["sampler"]["seen"])
    assert torch.equal(first["sampler"]["seen"], one_process["sampler"]["seen"])


def test_microbatches_are_averaged_over_ranks_once_a_step(images, one_process, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    ran = launch.torchrun(2, [str(script), images, str(tmp_path), "4", "1", "count"])
    check(ran)
    assert "deprecated" not in ran.stderr, ran.stderr
    done = load(tmp_path, 0)
    assert len(done["reduced"]) == STEPS
    for buckets in done["reduced"]:
        assert sorted(buckets) == list(range(len(buckets))) and buckets, (
            "a bucket of gradients travels more than once"
        )
    assert relative(done["first_gradient"], one_process["first_gradient"]) < 1e-5


def test_pictures_that_cannot_be_made_are_told_and_training_goes_on(images, tmp_path):
    """A NaN in an image of rank 1, then a file where rank 0 wants a folder; all ranks stay
    together.
    """
    script = tmp_path / "train.py"
    script.write_text(LOOP + PREVIEWS + TRAIN.removeprefix(LOOP))
    done = launch.torchrun(2, [str(script), images, str(tmp_path), "4", "-1"])
    check(done)
    said = [line for line in done.stdout.splitlines() if "no picture" in line]
    assert len(said) == 2 and all(line.endswith("; training goes on") for line in said), done.stdout
    assert (
        "warning: step 1: no picture of samples: 1 of 6 images contain NaN" in said[0]
        and "step 2" in said[1]
    )
    assert "Not a directory" in said[1] and [path.name for path in tmp_path.glob("*.png")] == [
        "samples_000003.png"
    ]
    first, second = load(tmp_path, 0), load(tmp_path, 1)
    assert all(map(torch.equal, first["weights"], second["weights"]))


@pytest.mark.parametrize("drop_in", ["", "1"])
def test_only_rank_0_needs_the_checkpoint(drop_in, images, one_run, tmp_path):
    """One read of a network disk and one copy in memory, for any number of processes; the others'
    path leads nowhere.
    """
    saved = tmp_path / "saved"
    shutil.copytree(one_run, saved)
    if drop_in:
        (saved / f"state{STEPS:06d}.pt").unlink()  # what guided-diffusion writes
    paths = {
        "RESUME0": str(saved / f"model{STEPS:06d}.pt"),
        "RESUME1": f"/nowhere/model{STEPS:06d}.pt",
    }
    check(
        launch.torchrun(
            2, ["-c", RESUMED, images, str(tmp_path), "4", "-1"], DROP_IN=drop_in, **paths
        )
    )
    for rank in (0, 1):
        for part, got in load(tmp_path, rank).items():
            want = torch.load(saved / f"{part}{STEPS:06d}.pt", weights_only=True)
            assert same(got, want), (rank, part)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda path: path.unlink(), "opt000004.pt is missing"),
        (lambda path: path.write_bytes(b"PK"), "opt000004.pt is damaged"),
    ],
)
def test_an_unusable_checkpoint_ends_all_ranks_with_one_line(harm, words, images, tmp_path):
    arguments = [
        str(ROOT / "scripts" / "image_train.py"),
        *TINY,
        "--data_dir",
        images,
        "--out_dir",
        str(tmp_path / "run"),
        "--global_batch_size",
        "4",
        "--ema_rate",
        "0.5",
        "--max_steps",
        "4",
    ]
    check(launch.run([sys.executable, *arguments]))
    harm(tmp_path / "run" / "opt000004.pt")
    done = launch.torchrun(2, [*arguments, "--resume", str(tmp_path / "run" / "model000004.pt")])
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr, done.stderr
    assert words in done.stderr and "guided_diffusion_ip/training/" not in done.stderr, done.stderr
    lines = {line.removeprefix("rank 1: ") for line in done.stderr.splitlines() if words in line}
    assert len(lines) == 1, "rank 1, which may be the first to end, says something else"


@pytest.mark.parametrize("launcher", [launch.mpiexec, launch.torchrun])
def test_scripts_train_and_sample_in_two_processes(launcher, images, tmp_path):
    run = tmp_path / "run"
    check(
        launcher(
            2,
            [
                str(ROOT / "scripts" / "image_train.py"),
                *TINY,
                "--data_dir",
                images,
                "--out_dir",
                str(run),
                "--batch_size",
                "2",
                "--max_steps",
                "2",
                "--ema_rate",
                "0.5",
                "--sample_interval",
                "2",
                "--sample_count",
                "3",
                "--sample_respacing",
                "2",
                "--log_interval",
                "1",
            ],
        )
    )
    assert (run / "samples_000002.png").exists()
    assert len((run / "progress.csv").read_text().splitlines()) == 3, "one rank writes"

    common = [
        str(ROOT / "scripts" / "image_sample.py"),
        "--model_path",
        str(run / "ema_0.5_000002.pt"),
        "--num_samples",
        "7",
        "--timestep_respacing",
        "3",
        "--eps_scaler",
        "1.01",
        "--batch_size",
    ]
    check(launcher(2, [*common, "2", "--out_dir", str(tmp_path / "two")]))
    check(launch.run([sys.executable, *common, "2", "--out_dir", str(tmp_path / "one")]))
    check(launch.run([sys.executable, *common, "5", "--out_dir", str(tmp_path / "five")]))
    one, two, five = (samples(tmp_path / name) for name in ("one", "two", "five"))
    assert one.shape == (7, 8, 8, 1)
    np.testing.assert_array_equal(one, two)  # equal batch shapes and threads: bitwise
    assert np.abs(one.astype(int) - five).max() <= 1


def samples(folder):
    with np.load(next(Path(folder).glob("*.npz"))) as npz:
        return npz["arr_0"]


def test_bad_input_in_two_processes_ends_both(images, tmp_path):
    done = launch.torchrun(
        2,
        [
            str(ROOT / "scripts" / "image_train.py"),
            *TINY,
            "--data_dir",
            str(tmp_path / "nowhere"),
            "--out_dir",
            str(tmp_path / "out"),
        ],
    )
    assert (
        done.returncode != 0 and "nowhere" in done.stderr and not os.path.exists(tmp_path / "out")
    )
