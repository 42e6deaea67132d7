"""Names, places and files: star imports, checkouts in a folder, improved_diffusion, other packages
beside a script, and checkpoints that hold more than tensors.
"""

import argparse
import datetime
import importlib
import inspect
import os
import pathlib
import sys
import types

import pytest
import torch
from launch import ROOT, run

from guided_diffusion_ip import compat
from guided_diffusion_ip.compat import checkpoints, other_package
from guided_diffusion_ip.compat import dist_util as compat_dist_util
from guided_diffusion_ip.dist_util import load_state_dict


@pytest.fixture(scope="module", autouse=True)
def installed():
    before = list(sys.path)
    compat.install()
    yield
    sys.path[:] = before


# ---- names ----


@pytest.mark.parametrize(
    "module, names",
    [
        ("nn", "math th nn SiLU GroupNorm32 mean_flat update_ema timestep_embedding checkpoint"),
        ("unet", "abstractmethod math np th nn F convert_module_to_f16 checkpoint conv_nd linear "),
        ("unet", "UNetModel ResBlock AttentionBlock QKVAttention QKVAttentionLegacy"),
        ("script_util", "argparse inspect gd SpacedDiffusion space_timesteps UNetModel str2bool"),
        ("script_util", "SuperResModel EncoderUNetModel NUM_CLASSES create_gaussian_diffusion"),
    ],
)
def test_star_imports_bring_what_they_brought(module, names):
    scope = {}
    exec(f"from guided_diffusion.{module} import *", scope)
    assert set(names.split()) <= set(scope)


def test_star_imports_bring_no_module_of_ours():
    scope = {}
    exec("from guided_diffusion.unet import *\nfrom guided_diffusion.script_util import *", scope)
    foreign = [
        name
        for name, value in scope.items()
        if isinstance(value, types.ModuleType) and value.__name__.startswith("guided_diffusion_ip")
    ]
    assert foreign == ["gd"]


@pytest.mark.parametrize("name", compat.MODULES)
def test_a_checkout_in_a_folder_is_the_same_package(name):
    nested = importlib.import_module(f"guided_diffusion.guided_diffusion.{name}")
    assert nested is importlib.import_module(f"guided_diffusion.{name}")
    scope = {}
    exec(f"import guided_diffusion.guided_diffusion.{name} as it", scope)
    assert scope["it"] is nested


@pytest.mark.parametrize("name", sorted(compat.OF_IMPROVED.keys() - {"script_util"}))
def test_improved_diffusion_is_a_second_name(name):
    assert importlib.import_module(f"improved_diffusion.{name}") is importlib.import_module(
        f"guided_diffusion.{name}"
    )


def test_improved_diffusions_factories_have_its_flags_and_defaults():
    from improved_diffusion import script_util

    flags = script_util.model_and_diffusion_defaults()
    known = inspect.getfullargspec(script_util.create_model_and_diffusion).args
    assert set(known) == set(flags) and known[3] == "sigma_small"
    assert flags["rescale_timesteps"] and flags["rescale_learned_sigmas"]
    small = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "diffusion_steps": 50}
    model, process = script_util.create_model_and_diffusion(
        **{**flags, **small, "sigma_small": True}, eps_scaler=1.1
    )
    assert process.rescale_timesteps and process.lambdas[0] == 1.1
    assert process.model_var_type is process.model_var_type.FIXED_SMALL
    assert process.loss_type is process.loss_type.RESCALED_MSE
    assert model.num_heads == 4 and model.channel_mult == (1, 2, 2, 2)
    flags = script_util.sr_model_and_diffusion_defaults()
    known = inspect.getfullargspec(script_util.sr_create_model_and_diffusion).args
    assert set(known) == set(flags)
    small = {"large_size": 32, "small_size": 8, "num_channels": 32, "num_res_blocks": 1}
    model, _ = script_util.sr_create_model_and_diffusion(**{**flags, **small})
    assert model.in_channels == 6


# ---- other packages ----

SCRIPT = """
import guided_diffusion, multiprocessing
def where():
    import guided_diffusion.unet
    return guided_diffusion.unet.__name__
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(where(), pool.apply(where))
"""
OURS = "guided_diffusion_ip.compat.unet guided_diffusion_ip.compat.unet"


def place(folder, **modules):
    """A package with these modules."""
    folder.mkdir(parents=True)
    for name, text in {"__init__": "", **modules}.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "repository" / "scripts"
    folder.mkdir(parents=True)
    (folder / "script.py").write_text(SCRIPT)
    return folder / "script.py"


def start(*words, **env):
    return run([sys.executable, "-m", "guided_diffusion_ip.compat", *map(str, words)], 60, **env)


@pytest.mark.parametrize("inside", ["scripts", ".", "nested"])
def test_a_changed_package_beside_the_script_is_not_replaced_silently(script, inside):
    repository = script.parent.parent
    package = repository / (inside if inside != "nested" else "guided_diffusion")
    if inside == "nested":  # a checkout has its own setup.py and scripts
        place(package, setup="")
    package = place(package / "guided_diffusion", unet="changed = True", extra="more = 1")
    done = start(script)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    for words in (str(package), "extra, unet", "guided_diffusion_ip", "--ours", "REPLACE=1"):
        assert words in done.stderr
    for words, env in ((["--ours", script], {}), ([script], {"GUIDED_DIFFUSION_IP_REPLACE": "1"})):
        done = start(*words, **env)
        assert (done.returncode, done.stdout.strip()) == (0, OURS), done.stderr
        assert done.stderr.count("note: ") == 1 and f"{package} is not used" in done.stderr


def test_a_changed_package_that_is_installed_is_not_replaced_silently(script, tmp_path):
    package = place(tmp_path / "site" / "guided_diffusion", unet="changed = True")
    done = start(script, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path / 'site'}")
    assert done.returncode == 2 and str(package) in done.stderr


@pytest.mark.parametrize("changed, words", [(True, []), (True, ["--ours"]), (False, [])])
def test_a_changed_improved_diffusion_beside_the_script_is_left_to_provide_its_name(
    script, changed, words
):
    script.write_text("import improved_diffusion.losses as it\nprint(it.__name__)")
    if changed:
        place(script.parent.parent / "improved_diffusion", losses="changed = True")
    done = start(*words, script)
    if changed and not words:  # it is not on the path, as without the runner
        assert "No module named 'improved_diffusion'" in done.stderr
    else:
        assert done.stdout.startswith("guided_diffusion_ip."), done.stderr


def test_comments_docstrings_and_layout_are_no_change(tmp_path, monkeypatch):
    text = 'def f(a, *, b=(1, 2)):\n    return {"a": a, "b": b}\n\n\nclass C:\n    x = 1\n'
    package = place(tmp_path / "p", unet=text)
    monkeypatch.setitem(
        other_package.KNOWN, "unet", (other_package.digest(str(package / "unet.py")),)
    )
    same = '# SPDX: MIT\n"""About."""\n' + text.replace(
        "    return {", '    """Doc."""\n    return  {  # here\n        '
    ).replace("x = 1", "'''Doc.'''\n    x = (1)")
    for changed, source in (
        ([], same),
        (["unet"], text.replace("x = 1", "x = 2")),
        (["unet"], text.replace("a, *, b", "a, b")),
        (["unet"], "def f(:"),
    ):
        (package / "unet.py").write_text(source)
        assert other_package.changed_modules(str(package)) == changed


def test_an_unchanged_package_is_replaced_with_a_note(script, monkeypatch, capsys):
    from guided_diffusion_ip.compat import __main__ as runner

    package = place(script.parent.parent / "guided_diffusion", unet="x = 1\n")
    monkeypatch.setitem(
        other_package.KNOWN, "unet", (other_package.digest(str(package / "unet.py")),)
    )
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    runner._arrange_path(str(script.parent), replace=False)
    assert f"the one in {package} is not used" in capsys.readouterr().err


def test_all_modules_have_known_versions():
    assert set(other_package.KNOWN) == set(compat.MODULES)


# ---- checkpoints ----


class Evil:
    def __reduce__(self):
        return print, ("code has run",)


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.pt"
    torch.save(
        {
            "model": {"w": torch.ones(2)},
            "args": argparse.Namespace(lr=1e-4, path=pathlib.Path("runs/x"), sizes=(1, [2])),
            "extra": types.SimpleNamespace(when=datetime.datetime(2022, 3, 4)),
        },
        path,
    )
    return path


def test_our_scripts_refuse_records_and_say_how_to_convert(records):
    with pytest.raises(ValueError, match="refused.*Namespace.*compat.checkpoints.*OUT.pt"):
        load_state_dict(records)


def test_records_are_restored_where_that_is_asked_for(records):
    content = checkpoints.load_with_records(records)
    assert torch.equal(content["model"]["w"], torch.ones(2))
    assert content["args"].lr == 1e-4 and content["args"].path == pathlib.Path("runs/x")
    assert content["extra"].when.year == 2022
    with pytest.raises(ValueError, match="refused"):
        load_state_dict(records)  # asked for once, not from here on


def test_scripts_on_ours_read_records_but_no_code(records, tmp_path, capsys):
    assert compat_dist_util.load_state_dict(records, map_location="cpu")["args"].lr == 1e-4
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="refused"):
        compat_dist_util.load_state_dict(tmp_path / "evil.pt", weights_only=False)
    assert "code has run" not in capsys.readouterr().out


def test_what_could_run_code_is_refused_there_too(tmp_path, capsys):
    torch.save({"a": argparse.Namespace(b=Evil())}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="refused"):
        checkpoints.load_with_records(tmp_path / "evil.pt")
    assert "code has run" not in capsys.readouterr().out


@pytest.mark.parametrize("key", [[], ["model"]])
def test_converting(records, tmp_path, key):
    target = tmp_path / "plain.pt"
    words = [sys.executable, "-m", "guided_diffusion_ip.compat.checkpoints", records, target, *key]
    done = run(list(map(str, words)), 60)
    assert done.returncode == 0, done.stderr
    content = load_state_dict(target)
    if key:
        assert torch.equal(content["w"], torch.ones(2))
    else:
        assert content["args"] == {"lr": 1e-4, "path": "runs/x", "sizes": (1, [2])}
        assert content["extra"] == {"when": "2022-03-04 00:00:00"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["x.pt"], "IN.pt OUT.pt"),
        (["no.pt", "y.pt"], "no such file"),
        (None, "'ema'; it has model"),
    ],
)
def test_converting_says_what_is_wrong(records, tmp_path, words, message):
    words = words or [records, tmp_path / "y.pt", "ema"]
    done = run(
        [sys.executable, "-m", "guided_diffusion_ip.compat.checkpoints", *map(str, words)], 60
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
