"""scripts/convert_checkpoint.py and the safetensors files: nothing is lost on any way, and what is
wrong is one line.
"""

import importlib.util
import json
import os
import re
import struct
import sys

import pytest
import torch
import yaml
from edm_files import KWARGS, edm_file, small_denoiser
from golden_tools import load_seeded_weights, seeded_checkpoint, seeded_normal
from launch import ROOT, run
from test_ddim_checkpoint import official

from guided_diffusion_ip import files, script_util
from guided_diffusion_ip.interop.adm_checkpoint import load_network
from guided_diffusion_ip.interop.edm_networks import create_edm_denoiser
from guided_diffusion_ip.interop.edm_pickle import edm_flags, read_edm_pickle
from guided_diffusion_ip.interop.safetensors_file import read_safetensors, write_safetensors
from guided_diffusion_ip.settings import config
from guided_diffusion_ip.settings.adopt import adopt_checkpoint_config
from guided_diffusion_ip.settings.beside import config_beside
from guided_diffusion_ip.settings.models import create_for_sampling, network_flags, process_flags
from guided_diffusion_ip.settings.yaml_file import read_yaml

MODEL = dict(
    image_size=16,
    num_channels=32,
    num_res_blocks=1,
    attention_resolutions="8",
    channel_mult="1,2",
    num_heads=1,
)
CONFIG = yaml.safe_dump(
    {
        "model": MODEL,
        "diffusion": {"diffusion_steps": 20, "noise_schedule": "cosine"},
        "train": {"lr": 0.001},
    }
)


SCRIPT = ROOT / "scripts" / "convert_checkpoint.py"


def convert(*argv):
    """The script as a process."""
    return run([sys.executable, str(SCRIPT), *map(str, argv)])


@pytest.fixture
def convert_here(monkeypatch):
    """The script's main() in this process, which is quicker."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        module.main()

    return call


def adm_folder(tmp_path, with_config=True):
    folder = tmp_path / "run"
    folder.mkdir()
    model = script_util.create_model_and_diffusion(**MODEL)[0]
    seeded_checkpoint(folder / "ema_0.9999_100.pt", model)
    if with_config:
        (folder / "config.yaml").write_text(CONFIG)
    return folder / "ema_0.9999_100.pt", model


# ---- safetensors ----


def bits(value):
    return value.contiguous().flatten().view(torch.uint8).tolist()


def test_round_trip_is_bitwise(tmp_path):
    whole = torch.linspace(-1, 1, 24)
    state = {
        "a.weight": whole.view(4, 6).t(),
        "shared": whole,
        "half": torch.tensor([1.5, float("nan"), -0.0]).half(),
        "bf": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "double": torch.rand(2, dtype=torch.float64),
    }
    path = tmp_path / "all.safetensors"
    write_safetensors(path, state, CONFIG)
    found, text = read_safetensors(path)
    assert text == CONFIG == files.safetensors_config(path) and found.keys() == state.keys()
    for name, value in state.items():
        assert (
            found[name].dtype == value.dtype
            and found[name].shape == value.shape
            and bits(found[name]) == bits(value)
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.safetensors"]


def test_damaged_and_foreign_files_are_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"w": torch.arange(6.0)}, CONFIG)
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    odd = json.dumps({"w": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}).encode()
    deep = b"[" * 100_000
    for data in (
        b"",
        whole[:5],
        whole[:40],
        whole[:-1],
        whole + b"x",
        struct.pack("<Q", 1 << 60) + whole[8:],
        b"PK\x03\x04" + whole,
        whole[:8] + b"[" + whole[9:],
        struct.pack("<Q", len(odd)) + odd + bytes(8),
        struct.pack("<Q", len(deep)) + deep,
    ):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match="x.safetensors: damaged, or no safetensors file"
        ) as error:
            read_safetensors(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="absent.safetensors: no such file"):
        read_safetensors(tmp_path / "absent.safetensors")
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert size and read_safetensors(path) == ({"w": torch.zeros(1)}, "")
    with pytest.raises(ValueError, match="note is str: a safetensors file holds tensors only"):
        write_safetensors(path, {"note": "x"}, "")


def test_a_missing_library_is_one_line_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (
        lambda: read_safetensors("x.safetensors"),
        lambda: write_safetensors(tmp_path / "x", {}, ""),
    ):
        with pytest.raises(ValueError, match=r"pip install 'guided_diffusion_ip\[convert\]'"):
            call()


def test_the_config_in_the_header_plays_the_part_of_the_one_beside(tmp_path):
    path = tmp_path / "model.safetensors"
    source, model = adm_folder(tmp_path)
    write_safetensors(path, torch.load(source), CONFIG)
    assert config_beside(str(path)) == str(path) and read_yaml(str(path)) == yaml.safe_load(CONFIG)
    cfg = config.parse("image_sample", "", [])
    cfg = adopt_checkpoint_config(cfg, config_beside(str(path)))
    assert {name: cfg.values[name] for name in MODEL} == MODEL and cfg.diffusion_steps == 20
    again = script_util.create_model_and_diffusion(**cfg.section("model"))[0]
    load_network(again, str(path), cfg.section("model"))
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items()
    )
    write_safetensors(path, torch.load(source), "")
    assert config_beside(str(path)) == ""
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert config_beside(str(path)) == str(tmp_path / "config.yaml")


# ---- the documents ----

DOCUMENTS = "\n".join(
    path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)


def test_the_documents_name_the_files_that_are_made(tmp_path, convert_here, monkeypatch):
    """Each --model_path in a folder that a documented command of this script makes."""
    monkeypatch.chdir(tmp_path)
    made = {}
    for source, folder in re.findall(
        r"convert_checkpoint\.py (\S+\.(?:pkl|ckpt)) ([a-z]\w*)", DOCUMENTS
    ):
        made.setdefault(folder, []).append(os.path.basename(source))
    used = {
        (os.path.dirname(path), os.path.basename(path))
        for path in re.findall(r"--model_path (\S+\.pt)\b", DOCUMENTS)
        if os.path.dirname(path) in made
    }
    assert {folder for folder, _ in used} == set(made) and len(made) >= 3, (
        "each command is followed by one that uses its file"
    )
    for folder, sources in made.items():
        for source in set(sources):
            if source.endswith(".pkl"):
                (tmp_path / source).write_bytes(edm_file(small_denoiser(torch.float32)))
            else:
                pytest.importorskip("diffusers")
                torch.save(official("cifar").state_dict(), source)
            convert_here(source, folder)
    for folder, name in used:
        assert name in os.listdir(folder), (folder, name)


def test_the_table_of_documented_names_is_what_is_made(tmp_path, convert_here):
    rows = re.findall(
        r"^\| `(\S+?)NAME\.pkl`.*\| a folder: `(\S+?)NAME\.pt`", DOCUMENTS, re.MULTILINE
    )
    assert len(rows) == 1
    ((before, after),) = rows
    source = tmp_path / f"{before}some-net.pkl"
    source.write_bytes(edm_file(small_denoiser(torch.float32)))
    convert_here(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.yaml", f"{after}some-net.pt"]


# ---- the script ----


def test_a_pickle_given_to_a_sampling_script_is_sent_to_this_one(tmp_path):
    source = tmp_path / "edm-small-vp.pkl"
    source.write_bytes(edm_file(small_denoiser(torch.float32)))
    done = run(
        [
            sys.executable,
            str(ROOT / "scripts" / "image_sample.py"),
            "--model_path",
            str(source),
            "--image_size",
            "16",
            "--num_channels",
            "32",
            "--num_res_blocks",
            "1",
        ]
    )
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    assert (
        f"python scripts/convert_checkpoint.py {source} FOLDER" in done.stderr
        and "damaged" not in done.stderr
    )


def test_edm_pickle_to_a_folder_that_makes_the_same_denoiser(tmp_path, convert_here):
    denoiser = small_denoiser(torch.float16)
    source = tmp_path / "edm-small-vp.pkl"
    source.write_bytes(edm_file(denoiser))
    done = convert(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    count = sum(p.numel() for p in denoiser.parameters())
    assert f"EDM's EDMPrecond, {count:,} parameters, float16\n" in done.stdout
    written = tmp_path / "out" / "edm_small-vp.pt"
    assert f"next: python scripts/image_sample.py --model_path {written}" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.yaml",
        "edm_small-vp.pt",
    ]
    state = torch.load(written)
    want = create_edm_denoiser("EDMPrecond", **KWARGS).eval()
    assert list(state) == list(want.state_dict()) and all(
        value.dtype == torch.float32 for value in state.values()
    )
    want.load_state_dict(denoiser.state_dict())
    cfg = config.parse("image_sample", "", ["--config", str(tmp_path / "out" / "config.yaml")])
    found = create_for_sampling(network_flags(cfg), process_flags(cfg))[0].eval()
    load_network(found, str(written), cfg.section("model"))
    x, sigma = seeded_normal("convert x", (2, 3, 16, 16)), torch.tensor([0.3, 4.0])
    assert torch.equal(found(x, sigma), want(x, sigma))

    before = written.read_bytes()
    with pytest.raises(
        ValueError, match="config.yaml and .*edm_small-vp.pt: there already; .* --overwrite True"
    ):
        convert_here(source, tmp_path / "out")
    assert written.read_bytes() == before
    written.write_bytes(b"old")
    convert_here(source, tmp_path / "out", "--overwrite", "True")
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    "precond, kwargs",
    [
        ("VPPrecond", dict(KWARGS, label_dim=10, label_dropout=0.1)),
        (
            "VEPrecond",
            dict(
                KWARGS,
                embedding_type="fourier",
                encoder_type="residual",
                channel_mult_noise=2,
                augment_dim=0,
                resample_filter=[1, 3, 3, 1],
            ),
        ),
        (
            "EDMPrecond",
            dict(
                img_resolution=16,
                img_channels=1,
                label_dim=5,
                model_type="DhariwalUNet",
                model_channels=64,
                num_blocks=1,
                channel_mult=[1, 2],
                attn_resolutions=[],
                sigma_data=0.7,
            ),
        ),
        (
            "iDDPMPrecond",
            dict(
                img_resolution=16,
                img_channels=3,
                model_channels=64,
                num_blocks=1,
                channel_mult=[1, 2],
                dropout=0.0,
                attn_resolutions=[16, 8],
                augment_dim=9,
            ),
        ),
    ],
)
def test_flags_build_what_the_arguments_build(tmp_path, precond, kwargs):
    want = create_edm_denoiser(precond, **kwargs)
    want.load_state_dict(load_seeded_weights(create_edm_denoiser(precond, **kwargs)).state_dict())
    path = tmp_path / "edm.pkl"
    path.write_bytes(edm_file(want, kwargs=kwargs))
    checkpoint = read_edm_pickle(path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(edm_flags(checkpoint)))
    cfg = config.parse("image_sample", "", ["--config", str(tmp_path / "config.yaml")])
    found = create_for_sampling(network_flags(cfg), process_flags(cfg))[0]
    assert type(found) is type(want) and found.label_dim == want.label_dim
    found.load_state_dict(checkpoint.state)
    x, sigma = (
        seeded_normal("convert x", (2, kwargs["img_channels"], 16, 16)),
        torch.tensor([0.3, 4.0]),
    )
    labels = torch.tensor([1, 3]) if want.label_dim else None
    assert torch.equal(found.eval()(x, sigma, labels), want.eval()(x, sigma, labels))
    assert found.train().model.label_dropout == kwargs.get("label_dropout", 0)


def test_adm_to_safetensors_and_back_loses_nothing(tmp_path, convert_here, capsys):
    source, model = adm_folder(tmp_path)
    one_file = tmp_path / "adm.safetensors"
    convert_here(source, one_file)
    assert (
        f"next: python scripts/image_sample.py --model_path {one_file}" in capsys.readouterr().out
    )
    assert files.safetensors_config(one_file) == CONFIG
    convert_here(one_file, tmp_path / "back")
    assert (tmp_path / "back" / "config.yaml").read_text() == CONFIG
    state = torch.load(tmp_path / "back" / "adm.pt")
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # The file is sampled as it is.
    sampled = run(
        [
            sys.executable,
            "scripts/image_sample.py",
            "--model_path",
            str(one_file),
            "--num_samples",
            "2",
            "--timestep_respacing",
            "2",
            "--out_dir",
            str(tmp_path / "samples"),
        ]
    )
    assert sampled.returncode == 0 and list((tmp_path / "samples").glob("samples_2x*.npz")), (
        sampled.stderr
    )


def test_ddim_checkpoint_to_a_folder_that_image_sample_takes(tmp_path, convert_here, capsys):
    pytest.importorskip("diffusers")
    from test_ddim_checkpoint import official

    weights = official("cifar").state_dict()
    average = {f"module.{name}": value + 1 for name, value in weights.items()}
    source, out = tmp_path / "model-790000.ckpt", tmp_path / "ddim"
    torch.save([weights, {"state": {}, "param_groups": []}, 3, 790000, average], source)
    with pytest.raises(ValueError, match="leave --config out"):
        convert_here(source, out, "--config", ROOT / "configs" / "cifar10.yaml")
    convert_here(source, out)
    assert (
        f"next: python scripts/image_sample.py --model_path {out}/ddim_model-790000.pt"
        in capsys.readouterr().out
    )
    state = torch.load(out / "ddim_model-790000.pt")
    assert torch.equal(state["conv_in.weight"], weights["conv_in.weight"] + 1)
    cfg = config.parse("image_sample", "", ["--config", str(out / "config.yaml")])
    assert cfg.framework == "ddpm" and cfg.image_size == 32
    load_network(
        create_for_sampling(network_flags(cfg), process_flags(cfg))[0],
        str(out / "ddim_model-790000.pt"),
        cfg.section("model"),
    )
    torch.save(official("no_attention").state_dict(), source)
    with pytest.raises(ValueError, match="add --image_size"):
        convert_here(source, out, "--overwrite")
    convert_here(source, out, "--overwrite", "--image_size", "16")


def test_what_is_wrong_is_one_line_and_leaves_nothing(tmp_path, convert_here):
    source, _ = adm_folder(tmp_path, with_config=False)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({"model": {**MODEL, "num_channels": 64}}))
    junk = tmp_path / "edm.pkl"
    junk.write_bytes(b"cposix\nsystem\n(S'touch was_run'\ntR.")
    out = tmp_path / "new" / "out.safetensors"
    list_file = tmp_path / "opt.pt"
    torch.save({"param_groups": [1]}, list_file)
    for argv, message in (
        ((), "give what to convert"),
        ((source, out), "no config.yaml beside it"),
        ((source, out, "--config", wrong), "it needs --num_channels 32 .now 64."),
        (
            (source, tmp_path / "new", "--config", wrong),
            "a name that ends in .safetensors instead of",
        ),
        ((source, out, "--config", wrong, "--image_size", 8), "leave --image_size out"),
        ((list_file, out, "--config", wrong), "opt.pt is not a state_dict of a network"),
        ((junk, out), "edm.pkl: refused, because this pickle holds posix.system"),
        ((junk, tmp_path / "new", "--config", wrong), "leave --config out"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            convert_here(*argv)
        assert "\n" not in str(error.value)
    done = convert(junk, tmp_path / "new")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and len(done.stderr.splitlines()) == 1
    )
    assert "posix.system, which could run code" in done.stderr and not done.stdout
    assert not (tmp_path / "new").exists()


def test_classifiers_and_super_resolution_find_their_scripts(tmp_path, convert_here, capsys):
    of_classifier = dict(
        classifier_width=32,
        classifier_depth=1,
        classifier_attention_resolutions="8",
        classifier_pool="spatial",
        classifier_use_fp16=False,
        classifier_use_scale_shift_norm=True,
        classifier_resblock_updown=True,
    )
    images, sizes = {"image_size": 16, "num_classes": 5}, {"large_size": 16, "small_size": 8}
    of_model = {key: value for key, value in MODEL.items() if key != "image_size"}
    for name, model, content, want in (
        (
            "classifier",
            script_util.create_classifier(**images, **of_classifier),
            {"model": images, "classifier": of_classifier},
            "classifier_sample.py --classifier_path",
        ),
        (
            "sr",
            script_util.sr_create_model_and_diffusion(**of_model, **sizes)[0],
            {"model": of_model, "super_res": sizes},
            "super_res_sample.py --model_path",
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        seeded_checkpoint(folder / "model.pt", model)
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        convert_here(folder / "model.pt", tmp_path / f"{name}.safetensors")
        assert (
            f"next: python scripts/{want} {tmp_path}/{name}.safetensors" in capsys.readouterr().out
        )


def test_half_precision_halves_the_file_and_rounds_once(tmp_path, convert_here):
    source, model = adm_folder(tmp_path)
    convert_here(source, tmp_path / "whole.safetensors")
    convert_here(source, tmp_path / "half.safetensors", "--half", "True")
    whole, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    convert_here(tmp_path / "half.safetensors", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "half.pt", weights_only=True)
    for name, value in model.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(back[name], expected)
    with pytest.raises(ValueError, match="--half True is for NAME.safetensors"):
        convert_here(tmp_path / "half.safetensors", tmp_path / "b", "--half", "True")
