"""fp16 and bf16 against fp32: gradients, what stays float32, learning; and what devices are
refused.
"""

import sys

import launch
import pytest
import torch
from test_guards import close_logs, images  # noqa: F401 (fixtures)
from test_resume import TRAIN, command, make_loop, rows
from test_training import relative

from guided_diffusion_ip.training import precision as precision_module
from guided_diffusion_ip.training.precision import Precision, check_device, resolve

# Relative L2 distance to the fp32 gradient, at most: three times what was measured.
# Measured: fp16 0.0015 in all and 0.0062 in the worst parameter, bf16 0.012 and 0.045 (their eps:
# 0.00098 and 0.0078).
WHOLE = {"fp16": 0.0045, "bf16": 0.036}
EACH = {"fp16": 0.019, "bf16": 0.135}


def gradients(images, out, mode):  # noqa: F811
    loop = make_loop(images, out, 1, precision=mode)
    loop.forward_backward(*next(loop.data))
    loop.precision.unscale(loop.opt)
    assert {p.grad.dtype for p in loop.model.parameters()} == {torch.float32}
    in_groups = [id(p) for group in loop.opt.param_groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in loop.model.parameters()), (
        "not every parameter is unscaled"
    )
    return {name: p.grad for name, p in loop.model.named_parameters()}


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_gradients_agree_with_fp32_in_every_parameter(mode, images, tmp_path):  # noqa: F811
    exact, rough = (gradients(images, tmp_path / m, m) for m in ("fp32", mode))
    assert 0 < relative(rough.values(), exact.values()) < WHOLE[mode]
    whole = float(torch.stack([g.norm() for g in exact.values()]).norm())
    compared = 0
    for name, g in exact.items():
        if float(g.norm()) > 1e-6 * whole:
            distance = relative([rough[name]], [g])
            assert distance < EACH[mode], name
            compared += 1
        else:  # a bias that the norm behind it takes away again: exactly 0 but for rounding
            assert float((rough[name] - g).norm()) < 1e-3 * EACH[mode] * whole, name
    assert compared > 0.8 * len(exact)


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_what_is_kept_stays_float32(mode, images, tmp_path):  # noqa: F811
    loop = make_loop(images, tmp_path, 2, precision=mode)
    seen = []
    hook = (
        loop.model.middle_block[0]
        .in_layers[2]
        .register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    )
    loop.run_loop()
    hook.remove()
    assert set(seen) == {precision_module.DTYPES[mode]}, "the arithmetic is not in this format"
    kept = [
        *loop.model.parameters(),
        *(x for ema in loop.emas for x in ema.weights.values()),
        *(x for state in loop.opt.state.values() for x in state.values()),
    ]
    assert len(kept) > 5 * len(list(loop.model.parameters())) and {x.dtype for x in kept} == {
        torch.float32
    }
    for path in tmp_path.glob("[em]*.pt"):
        assert {x.dtype for x in torch.load(path, weights_only=True).values()} == {torch.float32}


def test_all_formats_learn_alike(images, tmp_path):  # noqa: F811
    """The loss of the first and the last 5 of 20 steps; t and noise are the same, so formats differ
    by rounding only.
    """
    losses = {}
    for mode in ("fp32", "fp16", "bf16"):
        loop = make_loop(images, tmp_path / mode, 20, precision=mode, log_interval=5)
        loop.run_loop()
        assert not loop.progress.skipped
        losses[mode] = [
            float(row["mse"]) for row in rows(tmp_path / mode) if row["step"] in ("5", "20")
        ]
    for first, last in losses.values():
        assert last < 0.9 * first, losses
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.003)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_the_published_flag_and_ours_may_not_contradict_each_other(images, tmp_path):  # noqa: F811
    assert [
        resolve(*flags) for flags in (("", False), ("", True), ("fp16", True), ("bf16", False))
    ] == ["fp32", "fp16", "fp16", "bf16"]
    for mode in ("bf16", "fp32"):
        with pytest.raises(
            ValueError, match=f"--use_fp16 True and --precision {mode} contradict each other"
        ):
            resolve(mode, True)
    done = launch.run(
        [
            sys.executable,
            TRAIN,
            *command(images, tmp_path / "run", "--use_fp16", "True", "--precision", "bf16"),
        ]
    )
    assert (
        done.returncode == 2
        and "contradict each other: keep one" in done.stderr
        and not (tmp_path / "run").exists()
    )


def test_wrong_modes_and_growths():
    with pytest.raises(ValueError, match="unknown precision 'fp8': use one of fp32, fp16, bf16"):
        Precision("fp8", torch.device("cpu"))
    with pytest.raises(ValueError, match="fp16_scale_growth must be positive"):
        Precision("fp16", torch.device("cpu"), 0)


def test_a_checkpoint_of_another_format_starts_the_scale_afresh():
    fp16 = Precision("fp16", torch.device("cpu"))
    with pytest.warns(UserWarning, match="another precision: the loss scale starts afresh"):
        fp16.load_state_dict(Precision("fp32", torch.device("cpu")).state_dict())
    assert fp16.scaler.get_scale() == 2.0**16


# ---- devices that are not here ----

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    "name, capability, known, mode, words",
    [
        (
            "Tesla V100",
            (7, 0),
            CU126,
            "bf16",
            r"Tesla V100 \(sm_70\) has no bf16 units: use --precision fp16",
        ),
        ("Tesla T4", (7, 5), CU130, "bf16", "has no bf16 units"),
        (
            "Tesla V100",
            (7, 0),
            CU130,
            "fp16",
            r"no code for Tesla V100 \(sm_70; it has sm_75.*pip install torch --index-url "
            r"https://download.pytorch.org/whl/cu126",
        ),
        ("Tesla V100", (7, 0), CU130, "bf16", "no code for Tesla V100"),
        ("B200", (10, 0), CU126, "fp32", "no code for B200"),
        ("Tesla V100", (7, 0), CU126, "fp16", ""),
        ("Tesla V100", (7, 0), CU126, "fp32", ""),
        ("A100", (8, 0), CU126, "bf16", ""),
        ("L40", (8, 9), CU126, "bf16", ""),
        ("H200", (9, 0), CU130, "bf16", ""),
        ("B300", (10, 3), CU130, "bf16", ""),
        ("next", (13, 0), CU130, "bf16", ""),
        ("B200", (10, 0), [*CU126, "compute_90"], "bf16", ""),
        ("built here", (7, 0), [], "fp16", ""),
    ],
)
def test_devices_and_builds_that_cannot_do_it_are_one_clear_error(
    name, capability, known, mode, words, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: known)
    if not words:
        check_device(mode, torch.device("cuda", 0))
        return
    with pytest.raises(ValueError, match=words) as error:
        check_device(mode, torch.device("cuda", 0))
    assert "\n" not in str(error.value)
    check_device(mode, torch.device("cpu"))


@pytest.mark.parametrize("mode", ["fp32", "fp16", "bf16"])
def test_amd_devices_are_left_to_their_pytorch(mode, monkeypatch):
    """Their code is named gfx..., and a capability such as 9.4 has another meaning."""
    monkeypatch.setattr(torch.version, "hip", "6.2.41133")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a", "gfx942"])
    check_device(mode, torch.device("cuda", 0))
