"""Damaged and hostile inputs, by family: each is one line that names the file, before anything is
spent or written.
"""

import io
import os
import signal
import struct
import sys
import zipfile
import zlib

import launch
import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_ip.data import image_io, sources
from guided_diffusion_ip.data.npz_io import NpzReader
from guided_diffusion_ip.data.preprocessing import recorded
from guided_diffusion_ip.data.sources import open_source
from guided_diffusion_ip.evaluation.published import settings_beside
from guided_diffusion_ip.interop.adm_checkpoint import (
    infer_architecture,
    infer_classifier,
    require_fit,
)
from guided_diffusion_ip.interop.edm_pickle import EDMCheckpoint, edm_flags
from guided_diffusion_ip.preparation.lmdb_source import LmdbSource
from guided_diffusion_ip.runs.base_images import picture_names
from guided_diffusion_ip.runs.folder import claim_folder
from guided_diffusion_ip.script_util import create_model_and_diffusion
from guided_diffusion_ip.settings.command import presentable
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.lambda_file import read_schedule
from guided_diffusion_ip.settings.yaml_file import read_yaml
from guided_diffusion_ip.studies.report_data import read_yaml as read_yaml_for_report
from guided_diffusion_ip.studies.sweep import read_sweep
from guided_diffusion_ip.yaml_text import parse_yaml

# ---- YAML ----

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join(['*' + chr(97 + k)] * 10)}]\n" for k in range(8)
)
YAML = {
    "no YAML": b"{a: [",
    "an unknown tag": b"a: !!python/object:os.system x",
    "a date that is none": b"a: 2020-13-45",
    "int abc": b"a: !!int abc",
    "float abc": b"a: !!float abc",
    "bool abc": b"a: !!bool abc",
    "binary": b"a: !!binary \xc3\xa9",
    "0b2": b"a: !!int 0b2",
    "empty int": b"a: !!int ''",
    "many digits": b"b: " + b"9" * 5000,
    "400 digits": b"b: 1" + b"0" * 400,
    "nested": b"[" * 3000 + b"]" * 3000,
    "nested maps": b"{a: " * 200 + b"1" + b"}" * 200,
    "not UTF-8": b"a: \xff\xfe\xfd",
    "zeros": b"\0" * 50,
    "aliases": BOMB.encode(),
    "itself": b"a: &a [*a]",
    "a list as a key": b"? [a]\n: 1",
    "a mapping as a merge": b"<<: 3",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML.keys())
def test_yaml(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"^{path} is not valid YAML: .") as error:
        parse_yaml(text, str(path))
    assert len(str(error.value)) < 600
    for reader in (
        lambda: read_yaml(str(path)),
        lambda: read_schedule(str(path), 10),
        lambda: read_sweep(str(path)),
        lambda: claim_folder(str(tmp_path), {"seed": 0}, "samples"),
        lambda: parse("image_sample", "", ["--config", str(path)]),
    ):
        with pytest.raises(ValueError, match="settings.yaml") as error:
            reader()
        assert len(presentable(str(error.value))) < 2100
    assert settings_beside(str(tmp_path)) == {}
    if text.isascii():  # a report shows bytes that are not UTF-8 as such
        assert read_yaml_for_report(str(path)) == {}


def test_yaml_that_is_fine_stays():
    content = parse_yaml(
        "a: &x {b: 1, c: [0x10, 1e3, .inf]}\nd: *x\ne: {<<: *x, f: 2020-01-01}", "it"
    )
    assert content["d"] == {"b": 1, "c": [16, "1e3", float("inf")]} and content["e"]["b"] == 1
    assert parse_yaml("", "it") is None and parse_yaml(b"3", "it") == 3


# ---- npz ----


def npz_with_header(path, header, data=b"", key="arr_0", compressed=False):
    text = header + b" " * (-(len(header) + 11) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as packed:
        packed.writestr(f"{key}.npy", member)


HEADERS = {
    "an unclosed brace": b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 8, 8, 3",
    "a huge shape": b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 8, 8, 3)}",
    "a shape beyond 64 bits": b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,)}" % 10**30,
    "a negative side": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 8, 8, 3)}",
    "more than is there": b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, 8, 8, 3)}",
    "no dtype": b"{'descr': 'zzz', 'fortran_order': False, 'shape': (2,)}",
    "nested": b"(" * 5000,
    "a name": b"{'descr': '|u1', 'fortran_order': False, 'shape': os}",
    "binary": bytes(range(128, 256)),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_npz_headers(tmp_path, header, compressed):
    path = str(tmp_path / "x.npz")
    for key in ("arr_0", "preprocessing"):
        npz_with_header(path, header, b"\0" * 384, key, compressed)
        with pytest.raises(ValueError, match="x.npz: "), NpzReader(path) as reader:
            reader.shape(key)
        with pytest.raises(ValueError, match="x.npz"):
            open_source(path, class_cond=False)


def test_a_side_that_is_true_counts_as_one(tmp_path):
    path = str(tmp_path / "x.npz")
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (True, 4)}"
    npz_with_header(path, header, b"\1" * 4)
    with NpzReader(path) as reader:
        assert reader.shape("arr_0") == (1, 4)


def test_a_text_that_inflates_is_not_read(tmp_path):
    path = str(tmp_path / "x.npz")
    header = b"{'descr': '<U99999999', 'fortran_order': False, 'shape': ()}"
    npz_with_header(path, header, b"\0" * 4 * 99999999, "preprocessing", compressed=True)
    with pytest.raises(ValueError, match="at most .* bytes are expected"):
        recorded(path)


def test_labels_beyond_reason(tmp_path):
    path = str(tmp_path / "x.npz")
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=pixels, arr_1=np.array([0, 2**62]))
    with pytest.raises(ValueError, match="arr_1 holds the label 4611686018427387904: labels must"):
        open_source(path, class_cond=True)


# ---- checkpoints ----


@pytest.fixture(scope="module")
def network():
    flags = dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,1")
    flags |= dict(attention_resolutions="4", class_cond=True, num_classes=3)
    return flags, create_model_and_diffusion(**flags)[0]


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


ODD_TENSORS = {
    "a key that is no text": lambda s: {**s, 3: torch.zeros(1)},
    "no time embedding": lambda s: without(s, "time_embed.0.weight"),
    "a single number": lambda s: s | {"time_embed.0.weight": torch.tensor(1.0)},
    "no numbers": lambda s: s | {"time_embed.0.weight": torch.zeros(0)},
    "no width": lambda s: s | {"time_embed.0.weight": torch.zeros(4, 0)},
    "labels, a number": lambda s: s | {"label_emb.weight": torch.tensor(1.0)},
    "sparse": lambda s: s | {"out.2.bias": torch.zeros(6).to_sparse()},
    "meta": lambda s: s | {"out.2.bias": torch.zeros(3, device="meta")},
    "nested": lambda s: s | {"out.2.bias": torch.nested.nested_tensor([torch.zeros(3)])},
    "complex": lambda s: s | {"out.2.bias": torch.zeros(3, dtype=torch.complex64)},
    "only the ends": lambda s: {k: s[k] for k in ("input_blocks.0.0.weight", "out.2.weight")},
    "no input blocks but one": lambda s: {
        k: v for k, v in s.items() if not k.startswith("input_blocks.1")
    },
    "a block of another number": lambda s: s | {"input_blocks.99999.0.x": torch.zeros(1)},
}


@pytest.mark.parametrize("change", ODD_TENSORS.values(), ids=ODD_TENSORS.keys())
def test_tensors_of_a_checkpoint(network, change):
    flags, model = network
    flags = {**flags, "framework": "adm", "use_scale_shift_norm": False, "in_channels": 3}
    flags |= {"learn_sigma": False, "resblock_updown": False, "null_class": False}
    state = change(model.state_dict())
    with pytest.raises(ValueError, match="^x.pt"):
        require_fit(model, state, "x.pt", flags)
    if all(isinstance(name, str) for name in state):
        infer_architecture(state, 8), infer_classifier(state)


# ---- pictures and folders ----


def test_postscript_is_not_handed_to_ghostscript(tmp_path):
    bait = tmp_path / "bin"
    bait.mkdir()
    program = bait / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    program.chmod(0o755)
    (tmp_path / "d").mkdir()
    for name in ("cat_1.png", "cat_2.jpg"):
        (tmp_path / "d" / name).write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
        )
    code = (
        "import sys\n"
        "from guided_diffusion_ip.data.sources import open_source\n"
        "try:\n"
        "    open_source(sys.argv[1], False).image(0, 3)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    path = f"{bait}{os.pathsep}{os.environ['PATH']}"
    done = launch.run([sys.executable, "-c", code, str(tmp_path / "d")], PATH=path)
    assert "cat_1.png cannot be read as an image" in done.stdout
    assert not (tmp_path / "called").exists()


def test_every_listed_format_is_decoded(tmp_path):
    made = Image.new("RGB", (8, 8), (200, 10, 10))
    for format in image_io.FORMATS:
        file = io.BytesIO()
        made.save(file, format)
        image = image_io.decode_image(file.getvalue(), 3, "x")
        assert image.size == (8, 8) and image.getpixel((4, 4))[0] > 150


def test_pipes_and_devices_are_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    os.symlink("/dev/zero", tmp_path / "b.png")
    source = open_source(str(tmp_path), class_cond=False)
    signal.alarm(20)
    try:
        for i, name in enumerate("ab"):
            with pytest.raises(ValueError, match=f"{name}.png is no regular file"):
                source.image(i, 3)
    finally:
        signal.alarm(0)


def test_links_that_have_no_end_are_refused_by_name(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "a" / "1.png")
    os.symlink(tmp_path / "a", tmp_path / "twice")
    assert len(open_source(str(tmp_path), class_cond=False)) == 2, "a link aside is followed"
    os.symlink("..", tmp_path / "a" / "b" / "up")
    with pytest.raises(ValueError, match=r"b/up is a link to a folder that it lies in"):
        open_source(str(tmp_path), class_cond=False)


def test_a_packed_picture_that_inflates_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(sources.LARGEST_VARIABLE, "1")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", b"\0" * (2 << 20))
    source = open_source(str(tmp_path / "x.zip"), class_cond=False)
    with pytest.raises(
        ValueError, match=r"a.png would take 2,097,152 bytes; .*_LARGEST_IMAGE_FILE"
    ):
        source.image(0, 3)
    monkeypatch.setenv(sources.LARGEST_VARIABLE, "much")
    with pytest.raises(ValueError, match="=much: expected a number of MB"):
        source.image(0, 3)


def test_a_zip_whose_names_are_not_the_utf8_they_claim_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("caf\u00e9.png", b"")  # not ASCII: marked as UTF-8
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace("\u00e9".encode(), b"\xff\xff"))
    for read in (lambda path: open_source(path, class_cond=False), NpzReader, recorded):
        with pytest.raises(
            ValueError, match=r"x.zip cannot be read as an? (zip|npz) file: 'utf-8'"
        ):
            read(str(tmp_path / "x.zip"))


def test_classes_whose_names_are_not_utf8_are_refused(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    (tmp_path / "tea").mkdir()
    for place in (folder, os.fsencode(tmp_path / "tea")):
        with open(place + b"/1.png", "wb") as file:
            Image.new("L", (8, 8)).save(file, "PNG")
    with pytest.raises(ValueError, match="is not UTF-8"):
        open_source(str(tmp_path), class_cond=True)
    assert len(open_source(str(tmp_path), class_cond=False)) == 2


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_lmdb_is_found_before_it_is_mapped(tmp_path, share):
    lmdb = pytest.importorskip("lmdb")
    env = lmdb.open(str(tmp_path / "db"), map_size=1 << 24)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(
        file, "PNG"
    )
    for k in range(200):
        with env.begin(write=True) as transaction:
            transaction.put(b"%05d" % k, file.getvalue())
    env.close()
    assert len(LmdbSource(str(tmp_path / "db"))) == 200
    path = tmp_path / "db" / "data.mdb"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="it is cut short"):
        LmdbSource(str(tmp_path / "db"))
    path.write_bytes(zlib.compress(content))
    with pytest.raises(ValueError, match="is no LMDB file"):
        LmdbSource(str(tmp_path / "db"))


# ---- flags, and what is said ----


@pytest.mark.parametrize(
    "words",
    [
        ("image_train", "--lr", "inf"),
        ("image_train", "--lr", "1e38"),
        ("image_train", "--lr", "nan"),
        ("image_train", "--weight_decay", "nan"),
        ("image_train", "--dropout", "1.5"),
        ("image_train", "--dropout", "nan"),
        ("image_train", "--batch_size", str(10**20)),
        ("image_train", "--num_res_blocks", str(10**20)),
        ("image_train", "--num_heads", str(10**400)),
        ("image_sample", "--num_samples", str(10**20)),
        ("image_sample", "--seed", str(10**20)),
        ("image_sample", "--eps_scaler", "9" * 400),
        ("image_train", "--out_dir", "caf\udce9"),
        ("image_train", "--network_args", "{a: 2020-13-45}"),
    ],
    ids=lambda words: "".join(words[1:])[:40],
)
def test_flags_beyond_reason(words):
    script, *given = words
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(script, "", list(given))
    assert not isinstance(error.value, SystemExit) or error.value.code == 2


def test_what_is_said_is_one_line_of_sensible_length_that_no_terminal_obeys():
    assert presentable("a\n\x1b[31mb\udce9") == "a \\x1b[31mb\\udce9"
    assert len(presentable("x" * 100_000)) < 2100 and presentable("Häuser, 猫") == "Häuser, 猫"


@pytest.mark.parametrize("name", ["/".join("d" * 5000) + "/1.png", "a" * 300 + ".png"])
def test_names_that_no_picture_can_have(name):
    with pytest.raises(ValueError, match="cannot name a picture: it has"):
        picture_names([name], 3)


@pytest.mark.parametrize("blocks", [10_000, 10**400])
def test_an_edm_network_beyond_reason(blocks):
    checkpoint = EDMCheckpoint(
        "EDMPrecond", {"img_resolution": 8, "img_channels": 3, "num_blocks": blocks}, {}
    )
    with pytest.raises(ValueError, match="num_blocks 10000.*, which is beyond reason"):
        edm_flags(checkpoint)
