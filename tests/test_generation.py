"""Sampling runs: images that depend on (seed, number) alone, shards, gaps, merging, memory."""

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from golden_tools import load_seeded_weights

from guided_diffusion_ip.runs import shards as shards_module
from guided_diffusion_ip.runs.sample_batch import draw_labels, parse_class_ids, process_sampler
from guided_diffusion_ip.runs.samples import SampleRun
from guided_diffusion_ip.runs.shards import ShardFolder
from guided_diffusion_ip.script_util import create_model_and_diffusion

FLAGS = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    learn_sigma=True,
    noise_schedule="cosine",
    class_cond=True,
    num_classes=10,
    num_head_channels=32,
)


def network_and_sampler(**options):
    model, diffusion = create_model_and_diffusion(**FLAGS, timestep_respacing="5", eps_scaler=1.01)
    return load_seeded_weights(model), process_sampler(diffusion, (1, 8, 8), **options)


def in_batches(n, size, **options):
    model, sampler = network_and_sampler(**options)
    parts = [list(range(a, min(a + size, n))) for a in range(0, n, size)]
    return torch.cat(
        [sampler(model, part, {"y": draw_labels(0, part, range(10))}) for part in parts]
    )


@pytest.mark.parametrize("options", [{}, {"solver": "ddim"}, {"solver": "ddim", "eta": 0.7}])
def test_batch_size_changes_nothing_but_rounding(options):
    three, five = in_batches(11, 3, **options), in_batches(11, 5, **options)
    assert float((three - five).abs().max()) < 1e-4
    assert float(three.std()) > 0.05
    assert torch.equal(in_batches(11, 3, **options), three), "equal shapes and threads: bitwise"
    assert not torch.allclose(in_batches(11, 3, seed=1, **options), three)


def test_noise_and_labels_are_bitwise_the_same_in_any_batch():
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, x, t, y):
            seen.append(x.clone())
            return torch.zeros(len(x), 2, 8, 8)

    _, sampler = network_and_sampler()
    for parts in ([[0, 1, 2, 3, 4]], [[3, 4], [0, 1, 2]]):
        by_number = {}
        for part in parts:
            seen.clear()
            sampler(Recorder(), part, {"y": draw_labels(0, part, range(10))})
            by_number.update(
                {
                    i: (torch.stack([x[j] for x in seen]), int(draw_labels(0, [i], range(10))))
                    for j, i in enumerate(part)
                }
            )
        if len(parts) == 1:
            first = by_number
    assert all(
        torch.equal(first[i][0], by_number[i][0]) and first[i][1] == by_number[i][1]
        for i in range(5)
    )


def sample_run(out_dir, n=10, settings=None):
    model, sampler = network_and_sampler()
    run = SampleRun(
        sampler,
        n,
        str(out_dir),
        settings or {"seed": 0},
        lambda index: {"y": draw_labels(0, index, range(10))},
    )
    return run, model


def test_a_run_writes_exactly_what_was_asked_for(tmp_path):
    run, model = sample_run(tmp_path / "out")
    path = run(model, 4, torch.device("cpu"), png=True)
    assert os.path.basename(path) == "samples_10x8x8x1.npz"
    with np.load(path) as npz:
        assert (
            npz["arr_0"].shape == (10, 8, 8, 1)
            and npz["arr_0"].dtype == np.uint8
            and npz["arr_0"].std() > 10
        )
        assert (
            npz["arr_1"].dtype == np.int64
            and npz["arr_1"].tolist() == draw_labels(0, range(10), range(10)).tolist()
        )
    assert sorted(os.listdir(tmp_path / "out")) == [
        "grid.png",
        "png",
        "samples_10x8x8x1.npz",
        "settings.yaml",
    ]
    assert len(os.listdir(tmp_path / "out" / "png")) == 10


def test_a_run_fills_gaps_with_any_batch_size(tmp_path):
    run, model = sample_run(tmp_path / "whole")
    with np.load(run(model, 4, torch.device("cpu"))) as npz:
        whole = npz["arr_0"]
    run, model = sample_run(tmp_path / "gaps")
    shards = ShardFolder(str(tmp_path / "gaps" / "shards"), 10)
    marked = 255 - whole[4:8]  # a shard that is there is kept, not made again
    shards.write(4, {"arr_0": marked, "arr_1": draw_labels(0, range(4, 8), range(10)).numpy()})
    assert list(shards_module.in_batches(shards.gaps(), 3)) == [(0, 3), (3, 4), (8, 10)]
    with np.load(run(model, 3, torch.device("cpu"))) as npz:
        got = npz["arr_0"]
    np.testing.assert_array_equal(got[4:8], marked)
    assert (
        np.abs(got[:4].astype(int) - whole[:4]).max() <= 1
        and np.abs(got[8:].astype(int) - whole[8:]).max() <= 1
    )


def hidden_shard(tmp_path, monkeypatch, limit_s):
    """A set of 10 images whose second shard is not listed, as on a network file system; how to make
    it appear.
    """
    monkeypatch.setattr(shards_module, "LISTING_S", limit_s)
    folder = ShardFolder(str(tmp_path / "shards"), 10)
    rows = np.arange(10, dtype=np.int64)
    folder.write(0, {"arr_0": rows[:6]})
    folder.write(6, {"arr_0": rows[6:]})
    shown, hidden = os.path.join(folder.path, "shard-00000006-00000010.npz"), tmp_path / "elsewhere"
    os.rename(shown, hidden)
    return folder, lambda: os.rename(hidden, shown)


def test_merging_waits_for_shards_that_are_listed_late(tmp_path, monkeypatch):
    folder, show = hidden_shard(tmp_path, monkeypatch, limit_s=60)
    later = threading.Timer(1, show)
    later.start()
    folder.merge(str(tmp_path / "all.npz"))
    with np.load(tmp_path / "all.npz") as npz:
        assert npz["arr_0"].tolist() == list(range(10))
    assert not os.path.exists(folder.path)


def test_shards_that_never_appear_are_an_error_that_names_them(tmp_path, monkeypatch):
    folder, _ = hidden_shard(tmp_path, monkeypatch, limit_s=0.2)
    with pytest.raises(
        ValueError, match="shards lacks the images 6 to 9.*share this folder.*same command again"
    ):
        folder.merge(str(tmp_path / "all.npz"))
    assert folder.present() == [(0, 6)], "nothing is removed"


def test_other_settings_do_not_mix(tmp_path):
    run, model = sample_run(tmp_path, settings={"seed": 0, "eps_scaler": 1.0})
    run(model, 5, torch.device("cpu"))
    other, model = sample_run(tmp_path, settings={"seed": 0, "eps_scaler": 1.01})
    with pytest.raises(ValueError, match="eps_scaler 1.0 instead of 1.01.*--out_dir"):
        other(model, 5, torch.device("cpu"))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    # 189 MB more of pixels through a constant "network"; half of it is allowed, since the peak
    # itself scatters.
    script = textwrap.dedent("""
        import resource, sys, torch
        from guided_diffusion_ip.diffusion import *
        from guided_diffusion_ip.runs.sample_batch import process_sampler
        from guided_diffusion_ip.runs.samples import SampleRun
        d = SpacedDiffusion(use_timesteps=[0], betas=[0.5], model_mean_type=ModelMeanType.START_X,
                            model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE)
        n = int(sys.argv[2])
        SampleRun(process_sampler(d, (3, 128, 128), solver="ddim"), n, sys.argv[1], {})(
            lambda x, t: torch.zeros_like(x), 16, torch.device("cpu"))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    """)

    def peak(n):
        out = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / str(n)), str(n)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        return int(out.stdout.split()[-1])

    assert peak(4160) - peak(320) < 95, "peak memory in MB"


@pytest.mark.parametrize("text, ids", [("", list(range(10))), ("3", [3]), ("0-2,7", [0, 1, 2, 7])])
def test_class_ids(text, ids):
    assert parse_class_ids(text, 10) == ids
    assert set(draw_labels(0, range(200), ids).tolist()) == set(ids)


@pytest.mark.parametrize("text, message", [("10", "knows 0 to 9"), ("a-b", "not understood")])
def test_impossible_class_ids(text, message):
    with pytest.raises(ValueError, match=message):
        parse_class_ids(text, 10)
