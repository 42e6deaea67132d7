"""What a run's results depend on: the flags of role images, by construction; and old folders are
found again.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from guided_diffusion_ip.settings import likelihood, measuring, sampling
from guided_diffusion_ip.settings.config import from_values, parse
from guided_diffusion_ip.settings.flag import Flag, Role
from guided_diffusion_ip.settings.flags import DESCRIBING, SCRIPTS, SECTIONS, names
from guided_diffusion_ip.training import resume

# settings.yaml and folder of requests as they were before flags had roles.
EARLIER = json.loads((Path(__file__).parent / "identities.json").read_text())
SAMPLING = ("image_sample", "classifier_sample", "super_res_sample")


@pytest.fixture
def place(tmp_path):
    """Makes a checkpoint, its config and images in tmp_path; returns the flags that name them."""

    def make(script, config):
        (tmp_path / "ema_0.9999_000100.pt").write_bytes(b"weights")
        if config:
            (tmp_path / "config.yaml").write_text(EARLIER["configs"][config])
        size = 8 if config == "small" else 16
        pixels = (np.arange(3 * size * size * 3) % 251).astype(np.uint8)
        labels = {"arr_1": np.arange(3)} if config == "classes" else {}
        np.savez(tmp_path / "images.npz", arr_0=pixels.reshape(3, size, size, 3), **labels)
        weights, images = str(tmp_path / "ema_0.9999_000100.pt"), str(tmp_path / "images.npz")
        files = {
            "classifier_sample": {"classifier_path": weights},
            "super_res_sample": {"base_samples": images},
            "image_nll": {"data_dir": images},
        }
        return {"model_path": weights, **files.get(script, {})}

    return make


def request(script, cfg):
    return likelihood.request_from(cfg) if script == "image_nll" else sampling.request_from(cfg)


KNOWN = [case for case in EARLIER["cases"] if case["script"] in (*SAMPLING, "image_nll")]


@pytest.mark.parametrize(
    "case", KNOWN, ids=[f"{case['script']}-{case['config']}-{i}" for i, case in enumerate(KNOWN)]
)
def test_old_folders_are_found_again(case, place, tmp_path):
    files = place(case["script"], case["config"])
    argv = [word for name, path in files.items() for word in (f"--{name}", path)]
    made = request(case["script"], parse(case["script"], "", [*argv, *case["argv"]]))
    assert yaml.safe_dump(made.identity, sort_keys=False) == case["settings"]
    assert made.out_dir == str(tmp_path / case["folder"])


MEASURED = [
    case for case in EARLIER["cases"] if case["script"] in ("exposure_bias", "calibrate_eps")
]


@pytest.mark.parametrize("case", MEASURED, ids=[case["script"] for case in MEASURED])
def test_so_are_those_of_measures(case, place, tmp_path):
    files = place(case["script"], case["config"])
    argv = [word for name, path in files.items() for word in (f"--{name}", path)]
    cfg = parse(
        case["script"], "", [*argv, "--data_dir", str(tmp_path / "images.npz"), *case["argv"]]
    )
    cfg = sampling.complete_settings(cfg)
    settings = measuring.what_decides(cfg, measuring.open_real_images(cfg, (16, 16)))
    own = [flag.name for flag in SCRIPTS[case["script"]].extra]
    more = {name: value for name, value in settings.items() if name not in own}
    earlier = yaml.safe_load(case["settings"])
    # What scripts handed over besides was not part of what these cases recorded.
    assert {name: more[name] for name in earlier if name in more} == {
        name: value for name, value in earlier.items() if name in more
    }
    assert set(earlier) - set(more) <= {"data_dir", "num_images"}
    assert set(more) - set(earlier) <= {"eps_scaler", "eps_scaler_k"}


def test_every_flag_has_a_role():
    for script, spec in SCRIPTS.items():
        for flag in spec.flags():
            assert isinstance(flag.role, Role), (script, flag.name)
    assert all(role.value for role in Role)


def another(flag: Flag):
    """A value that is not the default."""
    words = {"solver": "heun", "timestep_respacing": "10", "class_ids": "0-1"}
    if flag.name in words:
        return words[flag.name]
    if flag.allowed:
        return next(value for value in flag.allowed if value not in (flag.default, ""))
    if isinstance(flag.default, bool):
        return not flag.default
    if flag.default == float("inf"):
        return 1.0
    return flag.default + 1 if isinstance(flag.default, (int, float)) else "5"


def with_and_without(script, flag, files):
    """The identities of two requests that differ in one flag alone."""
    always = dict(files)
    if flag.solvers:
        always["solver"] = "heun" if flag.solvers == "sigma" else flag.solvers
    if flag.name == "eta":
        always["use_ddim"] = True
    if flag.name in ("class_ids", "guidance_scale"):
        always |= {"class_cond": True, "num_classes": 3, "null_class": True}
    for changed in ({}, {flag.name: another(flag)}):
        yield request(script, from_values(script, {**always, **changed})).identity


def flags_of(*roles):
    """Those flags of the roles that do not describe the checkpoint."""
    return [
        pytest.param(script, flag, id=f"{script}-{flag.name}")
        for script in (*SAMPLING, "image_nll")
        for flag in SCRIPTS[script].flags()
        if flag.role in roles and flag.name not in names(DESCRIBING)
    ]


# What a super-resolution run refuses, because classes come with the images; a sampler of another
# kind than DDPM and DDIM is refused by what steers their steps.
REFUSED = [
    ("super_res_sample", "class_ids"),
    ("super_res_sample", "guidance_scale"),
    ("super_res_sample", "solver"),
    ("classifier_sample", "solver"),
]


@pytest.mark.parametrize("script, flag", flags_of(Role.IMAGES, Role.ARITHMETIC))
def test_a_flag_that_decides_the_images_is_part_of_the_identity(script, flag, place):
    files = place(script, "small" if script == "super_res_sample" else "")
    if (script, flag.name) in REFUSED:
        assert flag in SCRIPTS[script].deciding()
        return
    before, after = with_and_without(script, flag, files)
    assert before != after, f"old images would be returned for another --{flag.name}"


@pytest.mark.parametrize(
    "script, config, sections",
    [
        ("image_sample", "plain", ("model", "diffusion")),
        ("image_sample", "edm", ("model", "edm")),
        ("classifier_sample", "plain", ("model", "classifier", "diffusion")),
        ("super_res_sample", "small", ("model", "super_res", "diffusion")),
        ("image_nll", "plain", ("model", "diffusion")),
    ],
)
def test_all_that_describes_the_checkpoint_is_part_of_the_identity(script, config, sections, place):
    identity = request(script, from_values(script, place(script, config))).identity
    described = [
        flag.name
        for section in sections
        for flag in SCRIPTS[script].of_section(section)
        if not flag.quiet
    ]
    assert set(described) <= set(identity)


@pytest.mark.parametrize("script, flag", flags_of(Role.SPEED, Role.PLACE, Role.TELLING))
def test_a_flag_that_decides_no_image_is_not(script, flag, place):
    files = place(script, "small" if script == "super_res_sample" else "")
    before, after = with_and_without(script, flag, files)
    assert before == after


def test_lists_of_flags_follow_from_roles():
    assert names("diffusion", Role.LOSS)[:3] == (
        "use_kl",
        "rescale_learned_sigmas",
        "input_perturbation",
    )
    solvers = names("sample", solvers="sigma")
    assert "edm_steps" in solvers and "solver" not in solvers and "eta" not in solvers
    every = [flag.name for flag in SECTIONS["sample"]]
    assert sorted(names("sample")) == sorted(every)


# Which flags a run keeps when it is continued is written down in training/, below this room; it
# follows from roles all the same. Batch sizes count by the global batch.
BY_GLOBAL_BATCH = ("batch_size", "global_batch_size")


@pytest.mark.parametrize("script", ["image_train", "super_res_train", "classifier_train"])
def test_what_a_continued_run_keeps_follows_from_roles(script):
    kept = (Role.ARCHITECTURE, Role.PROCESS, Role.LOSS)
    noted = (Role.TRAINING, Role.INPUT)
    for flag in SCRIPTS[script].flags():
        if flag.name in BY_GLOBAL_BATCH:
            continue
        fixed = flag.name in names(resume._FIXED_SECTIONS) or flag.name in resume._FIXED
        kind = "free" if flag.name in resume._FREE else "fixed" if fixed else "noted"
        wanted = "fixed" if flag.role in kept else "noted" if flag.role in noted else "free"
        assert kind == wanted, flag.name
