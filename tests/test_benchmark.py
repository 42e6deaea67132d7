"""The benchmark: FLOP and bytes against a count by hand, the table, the JSON, and the script end to
end. Nothing depends on speed.

The published way must compute what ours does: test_benchmark_baseline.py.
"""

import json
import os
import runpy
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import launch
import pytest
import torch
from torch import nn

from guided_diffusion_ip import script_util
from guided_diffusion_ip.settings.config import parse
from tools.benchmark.limits import (
    Work,
    count_gflop,
    optimizer_work,
    sampling_work,
    saved_bytes,
    training_work,
    update_bytes,
)
from tools.benchmark.machine import COPIES, MATRIX_PRODUCTS, choose_device, copy_rates, matrix_rates
from tools.benchmark.report import BASELINE_HEADINGS, HEADINGS, head, notes, table
from tools.benchmark.rows import (
    BLOCKS,
    WARM_UP,
    Plan,
    Row,
    measure,
    measure_optimizer,
    measure_sampling,
    measure_training,
)
from tools.benchmark.settings import NAME

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
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
    "--num_head_channels",
    "32",
    "--batch_size",
    "2",
    "--repeats",
    "4",
    "--matrix_size",
    "32",
]
SMALL = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "8",
    "class_cond": True,
    "num_classes": 3,
}


class ConvAndLinear(nn.Module):
    """3 -> 8 channels by 3x3 convolution on 6 x 6 pixels, then 8 -> 5 by a linear map at each
    pixel.
    """

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x, t):
        return self.linear(self.conv(x).permute(0, 2, 3, 1))


class Attention(nn.Module):
    """7 tokens of 4 channels attend to each other."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        tokens = x.flatten(2).transpose(1, 2) * self.scale
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_flop_of_convolution_and_linear_map_as_counted_by_hand():
    plan = Plan(lambda: (ConvAndLinear(), None), (3, 6, 6), 0, batch_size=4, device=CPU)
    pixels = 4 * 6 * 6
    conv, linear = 2 * pixels * 3 * 8 * 9, 2 * pixels * 8 * 5
    assert count_gflop(plan, backward=False) * 1e9 == pytest.approx(conv + linear, rel=1e-12)
    # Backward: gradients of weights and inputs cost as much again each, but nobody needs the
    # gradient of the images.
    assert count_gflop(plan, backward=True) * 1e9 == pytest.approx(2 * conv + 3 * linear, rel=1e-12)


def test_attention_counts_as_two_products_forward_and_four_backward():
    plan = Plan(lambda: (Attention(), None), (4, 7, 1), 0, batch_size=3, device=CPU)
    product = 2 * 3 * 7 * 7 * 4
    assert count_gflop(plan, backward=False) * 1e9 == pytest.approx(2 * product, rel=1e-12)
    assert count_gflop(plan, backward=True) * 1e9 == pytest.approx(6 * product, rel=1e-12)


def test_gradient_checkpointing_does_not_count_as_work():
    def gflop(use_checkpoint):
        flags = {
            "image_size": 8,
            "num_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": "1,1",
            "attention_resolutions": "4",
        }
        flags["use_checkpoint"] = use_checkpoint
        plan = Plan(lambda: script_util.create_model_and_diffusion(**flags), (3, 8, 8), 0, 2, CPU)
        return count_gflop(plan, backward=True)

    assert gflop(True) == gflop(False)


def test_the_cifar10_architecture_at_64_channels():
    cfg = parse(
        NAME, "", ["--config", str(ROOT / "configs" / "cifar10.yaml"), "--num_channels", "64"]
    )

    def build():
        return script_util.create_model_and_diffusion(
            **cfg.section("model"), **cfg.section("diffusion")
        )

    with torch.device("meta"):
        assert script_util.parameter_count(build()[0]) == 14_301_446
    plan = Plan(build, (3, 32, 32), 0, 16, CPU)
    assert count_gflop(plan, backward=True) == pytest.approx(228.57, abs=0.01)
    assert count_gflop(plan, backward=False) == pytest.approx(76.21, abs=0.01)


def test_every_repeat_is_kept_and_the_rate_is_measured_around_them():
    calls = []
    plan = Plan(lambda: None, (1, 1, 1), 0, 2, CPU, repeats=7, matrix_size=16)
    row = measure(plan, "nothing", Work(1.0, 8), lambda: lambda: calls.append(1))
    assert len(calls) == WARM_UP + 7 and len(row.seconds) == 7
    assert len(row.matrix_gflop_per_s) == (BLOCKS + 1) * MATRIX_PRODUCTS
    assert len(row.copy_gb_per_s) == (BLOCKS + 1) * COPIES and row.moved_bytes == 8


def test_what_is_worked_out_from_the_repeats():
    row = Row(
        "x",
        "fp32",
        8,
        gflop=100.0,
        seconds=(2.0, 1.0, 4.0, 3.0, 2.0),
        matrix_gflop_per_s=(80.0, 100.0, 30.0),
        peak_memory_bytes=None,
        calls_per_image=10,
    )
    assert row.median_s == 2 and row.quartiles_s == (2, 3)
    assert row.images_per_s == pytest.approx(8 / 20)
    assert row.gflop_per_s == 50 and row.matrix_rate == 100 and row.share == 0.5
    lines = table([row, row]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert all(line.count("|") == len(HEADINGS) + 1 for line in lines)
    for cell in ("2000 (2000 to 3000)", "50.0%", "not known"):
        assert cell in lines[2]
    assert "chain of 10 calls" in notes([row]) and "30 to 100 GFLOP/s" in notes([row])


def test_matrix_rates_are_positive_in_every_format():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rates = matrix_rates(CPU, dtype, size=16, warm_up_s=0)
        assert len(rates) == MATRIX_PRODUCTS and min(rates) > 0
    assert len(copy_rates(CPU, 100)) == COPIES and min(copy_rates(CPU, 100)) > 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize("kept", [False, True])
def test_peak_memory_sees_what_has_been_given_back_but_not_what_was_there_before(kept):
    code = """
        import sys, torch
        from tools.benchmark.machine import PeakMemory
        from guided_diffusion_ip.allocator import keep_freed_memory
        if sys.argv[1] == "True":
            keep_freed_memory()
        megabytes = 1 << 20
        before = torch.ones(200 * megabytes, dtype=torch.uint8)
        del before
        memory = PeakMemory(torch.device("cpu"))
        memory.start()
        during = torch.ones(60 * megabytes, dtype=torch.uint8)
        del during
        assert 55 * megabytes < memory.growth() < 90 * megabytes, memory.growth()
    """
    # A process of its own: it is the whole process's memory that is looked at, whatever other tests
    # left there.
    done = launch.run([sys.executable, "-c", textwrap.dedent(code), str(kept)])
    assert done.returncode == 0, done.stderr


# ---- limits ----


def test_bytes_that_a_step_moves_at_least():
    plan = Plan(lambda: (ConvAndLinear(), None), (3, 6, 6), 0, batch_size=4, device=CPU)
    parameters, pixels = 3 * 8 * 9 + 8 + 8 * 5 + 5, 4 * 36
    assert update_bytes(parameters, 1) == 40 * parameters
    assert (
        optimizer_work(plan, 2).moved_bytes == 48 * parameters
        and optimizer_work(plan, 2).gflop == 0
    )
    # The convolution keeps its input of 3 channels, the linear map its input of 8.
    assert (
        saved_bytes(plan) == 4 * pixels * 11
        and saved_bytes(replace(plan, precision="bf16")) == 2 * pixels * 11
    )
    assert training_work(plan, 1).moved_bytes == (12 + 40) * parameters + 2 * 4 * pixels * 11
    assert sampling_work(plan).moved_bytes == 4 * parameters + 2 * 4 * pixels * 3
    attention = Plan(lambda: (Attention(), None), (4, 700, 1), 0, batch_size=1, device=CPU)
    assert saved_bytes(attention) < 4 * 700 * 4 * 10  # no [T, T]


def test_the_limit_is_whichever_takes_longer():
    row = Row(
        "x",
        "fp32",
        8,
        gflop=100.0,
        seconds=(4.0,),
        matrix_gflop_per_s=(50.0, 40.0),
        peak_memory_bytes=None,
        moved_bytes=10**9,
        copy_gb_per_s=(0.5, 1.0),
    )
    assert row.limit_s == 2 and row.share == 0.5
    assert replace(row, moved_bytes=3 * 10**9).limit_s == 3
    assert "100 GFLOP (12.5 per image) at 50 GFLOP/s" in head(
        [row]
    ) and "1000 MB moved at 1 GB/s" in head([row])


# ---- two ways in turn ----


def test_two_ways_take_turns_and_their_ratio_is_of_neighbours():
    calls = []
    plan = Plan(lambda: None, (1, 1, 1), 0, 2, CPU, repeats=5, matrix_size=16, baseline=True)
    row = measure(
        plan,
        "x",
        Work(1.0, 8),
        lambda: lambda: calls.append("a"),
        lambda: lambda: calls.append("b"),
    )
    assert calls == ["a"] * WARM_UP + ["b"] * WARM_UP + ["a", "b"] * 5
    assert len(row.seconds) == len(row.baseline_seconds) == 5
    row = replace(row, seconds=(1.0, 2.0, 3.0), baseline_seconds=(2.0, 2.0, 9.0))
    assert row.ratio == 1 and row.ratio_quartiles == (1.5, 2.5)
    lines = table([row, replace(row, baseline_seconds=())]).splitlines()
    assert "1.00 (1.50 to 2.50)" in lines[2] and len({line.count("|") for line in lines}) == 1


def test_the_published_format_on_each_device():
    plan = Plan(lambda: None, (1, 1, 1), 0, 2, CPU)
    for device, precision, published in (
        ("cpu", "bf16", "fp32"),
        ("cpu", "fp16", "fp32"),
        ("cuda", "fp32", "fp32"),
        ("cuda", "bf16", "fp16"),
        ("cuda", "fp16", "fp16"),
    ):
        assert (
            replace(plan, device=torch.device(device), precision=precision).baseline_precision
            == published
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_optimizer_row_updates_weights_and_averages_without_a_forward_pass(
    precision, monkeypatch
):
    made = []

    def build():
        made.append(script_util.create_model_and_diffusion(**SMALL))
        return made[-1]

    plan = Plan(build, (3, 8, 8), 3, 2, CPU, precision, repeats=1, matrix_size=16, baseline=True)
    monkeypatch.setattr("guided_diffusion_ip.networks.UNetModel.forward", None)
    row = measure_optimizer(plan, lr=1.0)
    assert row.gflop == 0 and row.moved_bytes > 0 and row.ratio > 0
    for network, _ in made[-2:]:
        assert next(network.parameters()).detach().abs().mean() > 1  # three updates of 1


def test_our_network_is_compiled_if_asked_for_and_the_published_one_is_not():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class OneConv(nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    def build():
        return OneConv(3, 3, 1), script_util.create_gaussian_diffusion(
            steps=30, timestep_respacing="3"
        )

    plan = Plan(
        build,
        (3, 8, 8),
        0,
        2,
        CPU,
        repeats=1,
        matrix_size=16,
        compile=True,
        compile_backend=backend,
    )
    for row in (measure_training, measure_sampling):
        torch._dynamo.reset()
        compiled.clear()
        assert row(plan).median_s > 0 and compiled
        compiled.clear()
        row(replace(plan, compile=False))
        assert not compiled
    torch._dynamo.reset()


# ---- the script ----


def run(*argv, capsys, monkeypatch):
    """The script as __main__ in this process: (exit code, stdout, stderr)."""
    path = ROOT / "tools" / "benchmark" / "__main__.py"
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr()
    return end.value.code, out.out, out.err


@pytest.mark.parametrize(
    "precision, more",
    [
        (
            "fp32",
            [
                "--class_cond",
                "True",
                "--num_classes",
                "3",
                "--schedule_sampler",
                "loss-second-moment",
            ],
        ),
        (
            "bf16",
            [
                "--use_ddim",
                "True",
                "--learn_sigma",
                "True",
                "--microbatch",
                "1",
                "--baseline",
                "True",
            ],
        ),
    ],
)
def test_script_end_to_end(precision, more, tmp_path, capsys, monkeypatch):
    path = tmp_path / "new" / "result.json"
    argv = [
        *TINY,
        "--device",
        "cpu",
        "--precision",
        precision,
        "--timestep_respacing",
        "3",
        "--json",
        str(path),
        *more,
    ]
    code, out, err = run(*argv, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, err
    assert (
        "training step" in out
        and "network call" in out
        and "chain of 3 calls" in out
        and str(path) in out
    )
    content = json.loads(path.read_text())
    assert set(content) == {"machine", "settings", "parameters", "rows"}
    assert {"cpu", "cores", "threads", "device", "torch", "tf32_matmul", "tf32_convolution"} <= set(
        content["machine"]
    )
    assert (
        content["machine"]["torch"] == torch.__version__
        and content["machine"]["threads"] == torch.get_num_threads()
    )
    assert content["settings"]["precision"] == precision and content["settings"]["batch_size"] == 2
    train, sample = content["rows"]
    assert train["calls_per_image"] == 1 and sample["calls_per_image"] == 3
    assert train["gflop"] > 2.5 * sample["gflop"] > 0
    for row in content["rows"]:
        assert len(row["seconds"]) == 4 and min(row["seconds"]) > 0
        assert row["median_s"] == sorted([*row["seconds"], row["median_s"]])[2]
        limit = max(
            row["gflop"] / max(row["matrix_gflop_per_s"]),
            row["moved_bytes"] / 1e9 / max(row["copy_gb_per_s"]),
        )
        assert row["limit_s"] == pytest.approx(limit) and row["share"] == pytest.approx(
            limit / row["median_s"]
        )
        assert (
            (row["ratio"] is not None)
            == ("--baseline" in more)
            == (row["baseline_precision"] == "fp32")
        )
    assert "limit of training step" in out and (BASELINE_HEADINGS[2] in out) == (
        "--baseline" in more
    )


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--what", "train,sampel"], "Did you mean sample?"),
        (["--what", ""], "train, sample"),
        (["--what", "loader", "--image_size", "8x16"], "8x16"),
        (["--what", "loader", "--data_dir", "nowhere"], "nowhere is no folder"),
        (["--eta", "0.5"], "--use_ddim"),
        (["--repeats", "0"], "at least 1"),
        (["--timestep_respacing", "2000"], "2000"),
        (["--num_channels", "40"], "multiple of 32"),
    ],
)
def test_wrong_settings_are_said_in_one_line_before_anything_is_measured(
    argv, says, capsys, monkeypatch
):
    code, out, err = run(*TINY, *argv, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and says in err and err.count("\n") == 1 and not out


def test_cuda_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(ValueError, match="--device cpu"):
        choose_device("cuda")


@pytest.mark.slow
def test_script_measures_what_has_no_row(tmp_path, capsys, monkeypatch):
    path = tmp_path / "result.json"
    argv = [
        *TINY,
        "--repeats",
        "1",
        "--num_workers",
        "1",
        "--what",
        "gather,loader,startup",
        "--json",
        str(path),
    ]
    code, out, err = run(*argv, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, err
    content = json.loads(path.read_text())
    assert (
        content["rows"] == []
        and content["gather"]["images"] == 600
        and len(content["startup"]["seconds"]) == 1
    )
    assert (
        content["startup"]["heavy"] == []
        and "beyond `import torch`" in out
        and "gathering 600 images" in out
    )
    assert len(content["loader"]) > 1 and all(len(way["rates"]) == 1 for way in content["loader"])
