"""What users and existing scripts rely on: flags and their defaults, known factory keys, and the
direction of imports.
"""

import ast
import json
from pathlib import Path

import pytest
import yaml
from golden_tools import DATA

from guided_diffusion_ip import __version__, script_util
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.flags import SCRIPTS, SECTIONS

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads((DATA / "published_flags.json").read_text())


@pytest.mark.parametrize("script", sorted(PUBLISHED))
def test_every_published_flag_with_its_default(script):
    cfg = parse(script, "", [])
    aliases = {alias: flag.name for flag in SCRIPTS[script].flags() for alias in flag.aliases}
    for name, default in PUBLISHED[script].items():
        value = cfg.values[aliases.get(name, name)]
        assert value == default and type(value) is type(default), (
            f"{script} --{name}: {value!r}, published {default!r}"
        )


@pytest.mark.parametrize("script", sorted(PUBLISHED))
def test_every_published_flag_is_accepted_on_the_command_line(script):
    argv = [
        word for name, default in PUBLISHED[script].items() for word in (f"--{name}", str(default))
    ]
    cfg = parse(script, "", argv)
    aliases = {alias: flag.name for flag in SCRIPTS[script].flags() for alias in flag.aliases}
    assert {name: cfg.values[aliases.get(name, name)] for name in PUBLISHED[script]} == PUBLISHED[
        script
    ]


def test_a_flag_is_declared_once_per_script():
    for script, spec in SCRIPTS.items():
        names = [name for flag in spec.flags() for name in (flag.name, *flag.aliases)]
        assert len(names) == len(set(names)), script
    model = {flag.name for flag in SECTIONS["model"]}
    assert not model & {flag.name for flag in SECTIONS["diffusion"]}


def test_defaults_are_the_published_keys_and_ours():
    ours = {"eps_scaler", "eps_scaler_k", "num_classes"}
    sampling_flags = PUBLISHED["image_sample"]
    own_of_script = {"clip_denoised", "num_samples", "batch_size", "use_ddim", "model_path"}
    defaults = script_util.model_and_diffusion_defaults()
    assert set(defaults) == set(sampling_flags) - own_of_script | ours
    assert all(defaults[name] == sampling_flags[name] for name in set(defaults) - ours)


def test_both_spellings_of_gamma_reach_the_process_and_may_not_differ():
    small = dict(image_size=16, num_channels=32, num_res_blocks=1)
    for name in ("input_pertub", "input_perturbation"):
        process = script_util.create_model_and_diffusion(**small, **{name: 0.15})[1]
        assert process.input_perturbation == process.input_pertub == 0.15
    with pytest.raises(ValueError, match="two spellings"):
        script_util.create_model_and_diffusion(**small, input_pertub=0.1, input_perturbation=0.15)


# ---- layering: each package may import only those listed for it ----

LEAVES = {
    "sizes",
    "noise",
    "dist_util",
    "logger",
    "files",
    "allocator",
    "ieee_float32",
    "early_signals",
    "go_between",
    "ownership",
    "yaml_text",
}
CORE = {"networks", "diffusion", "data", "features", "metrics"}
WORK = {"preparation", "evaluation", "training", "runs", "interop", "exposure_bias"}
MAY_IMPORT = {
    **{name: set() for name in LEAVES},
    "early_signals": {"go_between"},
    "dist_util": {"files", "early_signals"},
    "ownership": {"dist_util"},
    "networks": {"sizes"},
    "diffusion": set(),
    "data": {"noise", "files", "sizes"},
    "features": {"dist_util", "files", "allocator", "ieee_float32"},
    "metrics": {"dist_util", "files", "ieee_float32"},
    **{name: LEAVES | CORE for name in WORK},
    "interop": LEAVES | CORE | {"preparation", "runs"},
    "evaluation": LEAVES | CORE | {"runs"},
    "exposure_bias": LEAVES | CORE | {"runs"},
    "training": LEAVES | CORE | {"runs", "evaluation"},
    "settings": LEAVES | CORE | WORK,
    "script_util": LEAVES | CORE | WORK | {"settings"},
    "studies": LEAVES | CORE | WORK | {"settings", "script_util"},
    "api": LEAVES | CORE | WORK | {"settings"},
    "compat": LEAVES | CORE | WORK | {"settings", "script_util"},
    "__init__": set(),
}
FORBIDDEN_LIBRARIES = {
    "diffusion": {"argparse", "mpi4py", "yaml", "blobfile"},
    "networks": {"argparse", "numpy", "mpi4py"},
}


def imports_of(path):
    """(package of ours, top-level library) names imported anywhere in the file, also inside
    functions.
    """
    relative = path.relative_to(ROOT / "guided_diffusion_ip")
    depth = len(relative.parts)
    ours, libraries = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "guided_diffusion_ip":
                    ours |= set(rest[:1])
                else:
                    libraries.add(first)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                parts = node.module.split(".")
                if parts[0] != "guided_diffusion_ip":
                    libraries.add(parts[0])
                    continue
                ours |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            elif node.level == depth:  # reaches the package's top
                ours |= (
                    {node.module.split(".")[0]}
                    if node.module
                    else {alias.name for alias in node.names}
                )
    return ours, libraries


def test_imports_go_one_way():
    wrong = []
    for path in sorted((ROOT / "guided_diffusion_ip").rglob("*.py")):
        relative = path.relative_to(ROOT / "guided_diffusion_ip")
        own = relative.parts[0].removesuffix(".py")
        ours, libraries = imports_of(path)
        wrong += [
            f"{relative} imports {name}" for name in ours - {own, "__version__"} - MAY_IMPORT[own]
        ]
        wrong += [
            f"{relative} imports {name}" for name in libraries & FORBIDDEN_LIBRARIES.get(own, set())
        ]
        if "mpi4py" in libraries and own != "dist_util":
            wrong.append(f"{relative} imports mpi4py")
    assert not wrong, wrong


def test_configs_are_valid_for_the_scripts_that_read_them():
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(configs) >= 13
    for path in configs:
        for script in ("image_train", "image_sample"):
            parse(script, "", ["--config", str(path)])


@pytest.mark.parametrize(
    "name, million",
    [
        ("cifar10", 57.094662),
        ("cifar10_ip", 57.094662),
        ("imagenet32_ip", 57.094662),
        ("lsun_tower64", 295.136454),
        ("celeba64_ip", 295.136454),
        ("ffhq128_ip", 542.811398),
        ("imagenet64", 295.904454),
        ("imagenet128", 421.529606),
    ],
)
def test_configs_describe_the_published_networks(name, million):
    import torch

    cfg = parse("image_train", "", ["--config", str(ROOT / "configs" / f"{name}.yaml")])
    with torch.device("meta"):
        model, _ = script_util.create_model_and_diffusion(
            **cfg.section("model"), **cfg.section("diffusion")
        )
    assert script_util.parameter_count(model) == round(million * 1e6)


# The settings of arXiv 2301.11706 (its README and appendix): base channels, res blocks, head
# channels, attention, dropout, global batch, gamma, steps of the baseline and of IP. Common to all:
# T = 1000, cosine, learned sigma, lr 1e-4, EMA 0.9999.
PAPER = {
    "cifar10": (128, 3, 32, "16,8", 0.3, 128, 0.15, 500_000, 460_000),
    "imagenet32": (128, 3, 32, "16,8", 0.3, 512, 0.1, 4_500_000, 4_000_000),
    "lsun_tower64": (192, 3, 64, "32,16,8", 0.1, 256, 0.1, 300_000, 220_000),
    "celeba64": (192, 3, 64, "32,16,8", 0.1, 256, 0.1, 480_000, 300_000),
    "ffhq128": (256, 3, 64, "32,16,8", 0.1, 128, 0.1, 420_000, 180_000),
}
# FID by DDPM of the baseline and of IP (Table 3, final version), and lambda by number of steps
# (arXiv 2308.15321).
TABLES = {
    "cifar10": (
        {1000: 2.99, 300: 2.95, 100: 3.37, 80: 3.63},
        {1000: 2.76, 300: 2.67, 100: 2.70, 80: 2.93},
        {20: 1.017, 50: 1.017, 100: 1.017},
    ),
    "imagenet32": (
        {1000: 3.60, 300: 3.58, 100: 4.26, 80: 4.61},
        {1000: 2.87, 300: 2.74, 100: 3.24, 80: 3.57},
        None,
    ),
    "lsun_tower64": (
        {1000: 3.39, 300: 3.31, 100: 3.50, 80: 4.17},
        {1000: 2.68, 300: 2.60, 100: 2.79, 80: 2.95},
        {20: 1.011, 50: 1.007, 100: 1.006},
    ),
    "celeba64": (
        {1000: 1.60, 300: 1.82, 100: 3.02, 80: 3.75},
        {1000: 1.31, 300: 1.43, 100: 2.21, 80: 2.67},
        None,
    ),
    "ffhq128": (
        {1000: 9.65, 300: 9.55, 100: 14.52, 80: 17.00},
        {1000: 2.98, 300: 3.74, 100: 5.94, 80: 6.89},
        {20: 1.008, 50: 1.007, 100: 1.005},
    ),
}


@pytest.mark.parametrize("ip", [False, True])
@pytest.mark.parametrize("name", sorted(PAPER))
def test_configs_are_the_papers_settings(name, ip):
    channels, blocks, head, attention, dropout, batch, gamma, steps, ip_steps = PAPER[name]
    path = str(ROOT / "configs" / (f"{name}_ip.yaml" if ip else f"{name}.yaml"))
    cfg = parse("image_train", "", ["--config", path])
    assert (
        cfg.num_channels,
        cfg.num_res_blocks,
        cfg.num_head_channels,
        cfg.attention_resolutions,
        cfg.dropout,
    ) == (channels, blocks, head, attention, dropout)
    assert (
        cfg.learn_sigma
        and cfg.resblock_updown
        and cfg.use_new_attention_order
        and cfg.use_scale_shift_norm
    )
    assert (cfg.diffusion_steps, cfg.noise_schedule, cfg.rescale_learned_sigmas) == (
        1000,
        "cosine",
        True,
    ) and not cfg.class_cond
    assert (
        cfg.input_perturbation == (gamma if ip else 0)
        and cfg.schedule_sampler == "loss-second-moment"
    )
    assert (cfg.lr, cfg.ema_rate, cfg.weight_decay) == (1e-4, "0.9999", 0)
    assert cfg.global_batch_size == cfg.paper["global_batch"] == batch
    assert cfg.max_steps == cfg.paper["iterations"] == (ip_steps if ip else steps)

    sampling = parse("image_sample", "", ["--config", path])
    assert (
        sampling.num_samples == 50_000
        and sampling.eps_scaler == 1.0
        and sampling.eps_scaler_k == 0.0
    )
    evaluation = parse("evaluator", "", ["--config", path])
    assert (
        evaluation.features == "inception"
        and evaluation.metrics == "fid,sfid,is,prec,recall"
        and cfg.paper["reference"]
    )

    baseline_fid, ip_fid, lambdas = TABLES[name]
    fid = cfg.paper["fid_ddpm_gamma_0.1"] if name == "cifar10" and ip else cfg.paper["fid_ddpm"]
    assert fid == (ip_fid if ip else baseline_fid)
    assert cfg.paper.get("eps_scaler") == (None if ip else lambdas), (
        "published lambdas belong to gamma = 0"
    )


def test_the_version_to_cite_is_the_version_that_is_installed():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert [len(paper["authors"]) for paper in citation["references"]] == [5, 5, 5]
