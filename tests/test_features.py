"""Feature spaces other than Inception's: pixels, and models in ONNX files."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save_model
from stand_in_inception import field, images

from guided_diffusion_ip.features import onnx_file
from guided_diffusion_ip.features.spaces import open_features


def refused(spec, message, **settings):
    with pytest.raises(ValueError, match=message) as error:
        open_features(str(spec), device="cpu", **settings)
    assert "\n" not in str(error.value)


# ---- what may be asked for ----


def test_other_names_are_refused_with_the_allowed_ones(tmp_path):
    refused("clip", "no features called 'clip'; allowed: inception, pixels, .*onnx")
    refused("", "allowed: inception, pixels")
    refused("pixels", "precision is 'fp16'; allowed: fp32, bf16", precision="fp16")
    refused("pixels", "bf16 is for inception", precision="bf16")
    refused(tmp_path / "absent.onnx", "no such file")


@pytest.mark.parametrize("ending", [".pt", ".pth", ".pkl", ".pickle", ".ts", ".PT"])
def test_files_that_can_run_code_are_refused_whether_or_not_they_exist(tmp_path, ending):
    path = tmp_path / f"network{ending}"
    refused(path, "can run code .* export the network to ONNX")
    path.write_bytes(b"x")
    refused(path, "can run code")


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"uint8 .* got float32 \[2, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"got uint8 \[8, 8, 3\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"\[2, 8, 8, 4\]; leave out the fourth channel"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\[2, 3, 8, 8\]; this looks like \[n, C, H, W\]"),
        (torch.zeros((2, 8, 0, 3), dtype=torch.uint8), r"got uint8 \[2, 8, 0, 3\]"),
    ],
)
def test_images_of_another_kind_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        open_features("pixels", device="cpu")(bad)


# ---- pixels ----


def test_pixels_are_the_image_row_by_row_in_0_to_1():
    x = images(0, 3, 4, 6)
    space = open_features("pixels", device="cpu")
    assert (space.name, space.dim, space.has_spatial, space.has_logits) == (
        "pixels",
        0,
        False,
        False,
    )
    found = space(x)
    assert found.spatial is None and found.logits is None and space.dim == 72
    assert found.pool.dtype == torch.float32 and np.array_equal(
        found.pool, x.reshape(3, -1).astype(np.float32) / 255
    )
    assert torch.equal(space(torch.from_numpy(x)).pool, found.pool)
    assert space(x[:0]).pool.shape == (0, 72)
    assert space.describe() == {
        "name": "pixels",
        "precision": "fp32",
        "versions": {"torch": torch.__version__},
    }


def test_pixels_of_a_read_only_file_and_of_grey_images(tmp_path, recwarn):
    x = images(0, 2, 8, 8)[..., 1:2]
    np.save(tmp_path / "x.npy", x)
    found = open_features("pixels", device="cpu")(np.load(tmp_path / "x.npy", mmap_mode="r")[::-1])
    assert (
        np.array_equal(found.pool, x[::-1].reshape(2, 64).astype(np.float32) / 255)
        and not recwarn.list
    )


def test_pixels_must_be_of_one_size_and_few():
    space = open_features("pixels", device="cpu")
    assert space(images(0, 1, 36, 36)).pool.shape == (1, 3888)
    with pytest.raises(ValueError, match="one size, and there are 36x36x3 and 32x64x3 ones"):
        space(images(0, 1, 32, 64))
    assert open_features("pixels", device="cpu")(images(0, 1, 64, 64)[..., :1]).pool.shape == (
        1,
        4096,
    )
    for count in (0, 1):  # no images at all show the size too
        words = (
            "64x64x3 have 12288 .* 4096 .*are the most: use inception or an ONNX .*--image_size 32"
        )
        with pytest.raises(ValueError, match=words):
            open_features("pixels", device="cpu")(images(0, 1, 64, 64)[:count])


# ---- ONNX ----

WEIGHT = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)


def write_model(
    path,
    *,
    kind=TensorProto.UINT8,
    shape=("n", 3, "h", "w"),
    out=("n", 5),
    out_kind=TensorProto.FLOAT,
    inputs=1,
    external=False,
):
    """Means of the colours, times a matrix."""
    weight = WEIGHT[:1] if shape[1] == 1 else WEIGHT
    ins = [helper.make_tensor_value_info(f"images{i or ''}", kind, shape) for i in range(inputs)]
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["y"]),
        helper.make_node("Cast", ["y"], ["features"], to=out_kind),
    ]
    outs = [helper.make_tensor_value_info("features", out_kind, out)]
    graph = helper.make_graph(nodes, "g", ins, outs, [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save_model(
        model, path, save_as_external_data=external, location="weights.bin", size_threshold=0
    )
    return path


def test_onnx_features_are_the_models(tmp_path):
    path = write_model(tmp_path / "means.onnx")
    space = open_features(str(path), device="cpu")
    about = space.describe()
    assert (space.name, space.dim, space.has_spatial, space.has_logits, space.warnings) == (
        "means.onnx",
        5,
        False,
        False,
        [],
    )
    assert (
        about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        and about["file"] == "means.onnx"
    )
    for x in (images(0, 3, 8, 12), images(1, 1, 5, 5)):
        found = space(x)
        assert found.pool.dtype == torch.float32 and found.spatial is None and found.logits is None
        assert np.allclose(found.pool, x.astype(np.float64).mean((1, 2)) @ WEIGHT, rtol=1e-5)
    assert space(x[:0]).pool.shape == (0, 5)
    grey = images(0, 2, 8, 8)[..., :1]
    assert torch.equal(space(grey).pool, space(grey.repeat(3, axis=3)).pool)
    assert (
        set(about["versions"]) == {"torch", "onnxruntime"}
        and about["provider"] == "CPUExecutionProvider"
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"kind": TensorProto.FLOAT},
            r"takes images tensor\(float\) .*tensor\(uint8\) and shape \[n, 3, H, W\] is needed",
        ),
        ({"shape": ("n", 1, 8, 8)}, r"takes images tensor\(uint8\) \['n', 1, 8, 8\]"),
        ({"shape": (4, 3, 8, 8), "out": (4, 5)}, "takes 4 images at a time only"),
        ({"inputs": 2}, r"takes images tensor\(uint8\) .*, images1 tensor\(uint8\)"),
        (
            {"out_kind": TensorProto.DOUBLE},
            r"gives features tensor\(double\) .*tensor\(float\) and shape \[n, D\]",
        ),
    ],
)
def test_onnx_models_of_another_form_are_refused(tmp_path, settings, message):
    refused(write_model(tmp_path / "odd.onnx", **settings), message)


def test_onnx_images_of_another_size_are_refused(tmp_path):
    space = open_features(
        str(write_model(tmp_path / "m.onnx", shape=("n", 3, 8, "w"))), device="cpu"
    )
    assert space(images(0, 1, 8, 10)).pool.shape == (1, 5)
    with pytest.raises(ValueError, match=r"takes images of 8xany .* these have 10x8"):
        space(images(0, 1, 10, 8))


def test_damaged_onnx_files_are_refused(tmp_path):
    content = write_model(tmp_path / "whole.onnx").read_bytes()
    for bad in (
        b"",
        b"text, and no model at all",
        content[:-30],
        content[:40],
        np.random.default_rng(0).bytes(300),
    ):
        (tmp_path / "bad.onnx").write_bytes(bad)
        refused(tmp_path / "bad.onnx", r"bad\.onnx: no ONNX model")


def test_onnx_weights_in_other_files_are_not_followed(tmp_path, monkeypatch):
    path = write_model(tmp_path / "two.onnx", external=True)
    assert (tmp_path / "weights.bin").exists()
    monkeypatch.chdir(tmp_path)  # where onnxruntime would find them
    refused(path, "weights in another file; save it as one file")


# Field numbers of onnx.proto from the model to a tensor: wherever one can be, its weights may be in
# another file.
PLACES = {
    "initializer": (7, 5),
    "sparse values": (7, 15, 1),
    "sparse indices": (7, 15, 2),
    "attribute": (7, 1, 5, 5),
    "attribute list": (7, 1, 5, 10),
    "inner graph": (7, 1, 5, 6, 5),
    "inner graphs": (7, 1, 5, 11, 5),
    "sparse attribute": (7, 1, 5, 22, 1),
    "sparse attributes": (7, 1, 5, 23, 2),
    "function": (25, 7, 5, 5),
}


@pytest.mark.parametrize("place", PLACES)
def test_external_weights_are_found_wherever_onnx_has_tensors(place):
    for location, outside in ((1, True), (0, False)):
        content = field(14, location)
        for number in reversed(PLACES[place]):
            content = field(number, content)
        if outside:
            with pytest.raises(ValueError, match="m.onnx has weights in another file"):
                onnx_file.refuse_external_data("m.onnx", field(1, 8) + content)
        else:
            onnx_file.refuse_external_data("m.onnx", field(1, 8) + content)


def test_a_missing_onnxruntime_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(
        write_model(tmp_path / "m.onnx"),
        r"onnxruntime, which is not installed; run: pip install .*\[onnx\]",
    )


def test_onnxruntime_says_nothing_and_is_imported_only_when_needed(tmp_path):
    path = write_model(tmp_path / "m.onnx")
    code = (
        "import sys, numpy as np\nfrom guided_diffusion_ip.features.spaces import open_features\n"
        f"assert 'onnxruntime' not in sys.modules\nprint(open_features({str(path)!r}, "
        "device='cpu')(np.ones((2, 8, 8, 3), np.uint8)).pool.shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr, run.returncode) == ("torch.Size([2, 5])", "", 0)
