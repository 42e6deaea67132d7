"""Feature spaces, which images are compared in: Inception's features for the published scores, any
ONNX model's, or pixels.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..files import open_binary
from ..ieee_float32 import ieee_float32
from . import inception, inception_weights
from .tf_graph import fields

# A Frechet distance takes D^3 operations: 18 s at 3072 (32x32x3) and 45 s at 4096 on one busy core,
# so 20 minutes at 12288 (64x64x3).
MAX_PIXEL_DIM = 64 * 64
PRECISIONS = ("fp32", "bf16")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ts")


@dataclass
class Features:
    """Of n images, float32, on the device that made them.

    pool: feature vectors [n, D].
    spatial: [n, 2023], the 17x17x7 map of sFID in the order height, width, channel; None where a
        space has none.
    logits: [n, 1008], before the softmax and without bias; None where a space has none.
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureSpace(Protocol):
    """Images uint8 [n, H, W, C], C = 1 or 3, as an array or a tensor -> Features; what n is changes
    nothing but rounding.

    dim: length of a feature vector; 0 as long as that depends on images which are yet to come.
    warnings: what a reader of the scores must know.
    """

    name: str
    dim: int
    has_spatial: bool
    has_logits: bool
    warnings: list[str]

    def describe(self) -> dict[str, Any]:
        """What it takes to have the same features again, as plain values."""

    def __call__(self, images: np.ndarray | Tensor) -> Features:
        """Raises ValueError for images of another type, shape or size than this space takes."""


def open_features(
    spec: str,
    *,
    device: torch.device | str,
    precision: str = "fp32",
    inception_weights: str = "",
    allow_download: bool = False,
    log: Callable[[str], object] = print,
) -> FeatureSpace:
    """The feature space that `spec` names: inception, pixels, or the path of an ONNX file.

    Args:
        precision: fp32, or bf16 for Inception's convolutions in bfloat16: faster, and not for
            figures to publish.
        inception_weights, allow_download: as of `inception_weights.resolve`.

    Raises:
        ValueError: an unknown spec, a missing or damaged file, a missing package.
    """
    spec = os.fspath(spec)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed: {', '.join(PRECISIONS)}")
    if spec == "inception":
        return InceptionSpace(
            inception_weights, torch.device(device), precision, allow_download, log
        )
    if precision != "fp32":
        raise ValueError(f"precision {precision} is for inception features; with {spec}, use fp32")
    if spec == "pixels":
        return PixelSpace()
    if spec.lower().endswith(".onnx"):
        return OnnxSpace(spec, torch.device(device))
    allowed = "allowed: inception, pixels, or the path of a file that ends in .onnx"
    if spec.lower().endswith(PICKLES):
        raise ValueError(
            f"features from {spec} are refused: such a file can run code when it is read, and "
            f"holds no network otherwise; export the network to ONNX (torch.onnx.export); {allowed}"
        )
    raise ValueError(f"there are no features called {spec!r}; {allowed}")


def image_tensor(images: np.ndarray | Tensor) -> Tensor:
    """The images as a tensor uint8 [n, H, W, C], C = 1 or 3; an array is copied, since it may be a
    view of a file.

    Raises:
        ValueError: another type or shape.
    """
    shape, kind = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    if kind != "uint8" or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:]:
        hint = ""
        if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
            hint = "; this looks like [n, C, H, W]: move the channels to the end"
        elif len(shape) == 4 and shape[3] == 4:
            hint = "; leave out the fourth channel (opacity)"
        raise ValueError(
            f"images must be uint8 [n, H, W, C] with 1 or 3 channels, got {kind} "
            f"{list(shape)}{hint}"
        )
    return images if isinstance(images, Tensor) else torch.from_numpy(np.array(images, order="C"))


def as_rgb(images: Tensor) -> Tensor:
    """Grey images as three equal channels: [n, H, W, C] -> [n, H, W, 3]."""
    return images.expand(-1, -1, -1, 3)


class PixelSpace:
    """The pixels in [0, 1], row by row: for small images, where every difference counts alike."""

    name, has_spatial, has_logits = "pixels", False, False

    def __init__(self) -> None:
        self.dim, self.warnings = 0, []
        self._shape: tuple[int, ...] = ()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "precision": "fp32", "versions": {"torch": torch.__version__}}

    def __call__(self, images: np.ndarray | Tensor) -> Features:
        images = image_tensor(images)
        shape = tuple(images.shape[1:])
        self._shape = self._shape or shape
        if shape != self._shape:
            raise ValueError(
                f"pixels compare images of one size, and there are {_size(self._shape)} and "
                f"{_size(shape)} ones; resize one of the sets, or use inception"
            )
        dim = math.prod(shape)
        if dim > MAX_PIXEL_DIM:
            raise ValueError(
                f"images of {_size(shape)} have {dim} pixel values, and a Frechet distance "
                f"between so many would take very long; {MAX_PIXEL_DIM} (36x36x3, 64x64x1) "
                "are the most: use inception or an ONNX model as features, or smaller images "
                "(evaluations: --image_size 32)"
            )
        self.dim = dim
        return Features(images.flatten(1).float() / 255)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class InceptionSpace:
    """The features of FID, sFID, Inception Score and their kin."""

    name, dim, has_spatial, has_logits = "inception", inception.POOL_DIM, True, True

    def __init__(
        self,
        weights: str,
        device: torch.device,
        precision: str,
        allow_download: bool,
        log: Callable[[str], object],
    ) -> None:
        inception.layer_library()  # what is missing is said before anything is downloaded
        path = inception_weights.resolve(weights, allow_download=allow_download, log=log)
        loaded = inception_weights.load(path)
        self._device, self._precision = device, precision
        self._network = inception.build(loaded.state, device)
        self._about = {
            "name": self.name,
            "file": os.path.basename(path),
            "sha256": loaded.sha256,
            "published": loaded.published,
            "weights": loaded.status,
            "precision": precision,
            "versions": {"torch": torch.__version__, "torch-fidelity": inception.library_version()},
        }
        self.warnings = []
        if not loaded.published:
            self.warnings.append(
                f"Inception weights {path}: {loaded.status} (sha256 {loaded.sha256}); compare "
                "scores only among runs with this file"
            )
        if precision == "bf16":
            self.warnings.append(
                "Inception in bfloat16: compare scores only among runs with bf16; publish those "
                "of fp32"
            )

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def __call__(self, images: np.ndarray | Tensor) -> Features:
        images = as_rgb(image_tensor(images).to(self._device))
        with torch.inference_mode(), ieee_float32():
            found = self._network(images, bf16=self._precision == "bf16")
        return Features(
            *(value.clone() for value in found)
        )  # outside: tensors that may be changed in place


class OnnxSpace:
    """A model in an ONNX file, run by onnxruntime: uint8 [n, 3, H, W] -> float32 [n, D]."""

    has_spatial, has_logits = False, False

    def __init__(self, path: str, device: torch.device) -> None:
        runtime = _onnxruntime()
        try:
            with open_binary(path) as file:
                content = file.read()
        except (FileNotFoundError, IsADirectoryError):
            raise ValueError(f"features from {path}: no such file") from None
        _refuse_external_data(path, content)
        self._path, self._device, self._errors = path, device, _errors(runtime)
        self._session = _session(runtime, path, content, device)
        self._input, self._size = self._check_input()
        self.dim = self._check_output()
        self.name, self.warnings = os.path.basename(path), []
        self._about = {
            "name": self.name,
            "file": self.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "published": None,
            "precision": "fp32",
            "provider": self._session.get_providers()[0],
            "versions": {"torch": torch.__version__, "onnxruntime": runtime.__version__},
        }

    def _check_input(self) -> tuple[str, tuple[int | None, int | None]]:
        """Name of the input; height and width where they are fixed."""
        inputs = self._session.get_inputs()
        if (
            len(inputs) != 1
            or inputs[0].type != "tensor(uint8)"
            or len(inputs[0].shape) != 4
            or inputs[0].shape[1] != 3
        ):
            raise ValueError(
                f"{self._path} takes {_signature(inputs)}, and one input of type tensor(uint8) and "
                "shape [n, 3, H, W] is needed; export it so, with the scaling of pixels inside"
            )
        batch, _, *size = inputs[0].shape
        if type(batch) is int:
            raise ValueError(
                f"{self._path} takes {batch} images at a time only; export it with a dynamic first "
                "axis"
            )
        return inputs[0].name, tuple(n if isinstance(n, int) else None for n in size)

    def _check_output(self) -> int:
        """Length of the feature vector; 0 if the file does not say."""
        outputs = self._session.get_outputs()
        if len(outputs) != 1 or outputs[0].type != "tensor(float)" or len(outputs[0].shape) != 2:
            raise ValueError(
                f"{self._path} gives {_signature(outputs)}, and one output of type tensor(float) "
                "and shape [n, D] is needed; export it so"
            )
        return outputs[0].shape[1] if isinstance(outputs[0].shape[1], int) else 0

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def __call__(self, images: np.ndarray | Tensor) -> Features:
        images = as_rgb(image_tensor(images).cpu()).permute(0, 3, 1, 2).contiguous()
        if any(want not in (None, have) for want, have in zip(self._size, images.shape[2:])):
            raise ValueError(
                f"{self._path} takes images of {_size(tuple(n or 'any' for n in self._size))} "
                f"(height x width), and these have {_size(images.shape[2:])}; resize them, or use "
                "another feature space"
            )
        try:
            (pool,) = self._session.run(None, {self._input: images.numpy()})
        except self._errors as error:
            raise ValueError(
                f"{self._path} fails on images of {_size(images.shape)}: {_first_line(error)}"
            ) from None
        if (
            pool.ndim != 2
            or pool.shape[0] != len(images)
            or pool.shape[1] != (self.dim or pool.shape[1])
        ):
            raise ValueError(
                f"{self._path} makes {list(pool.shape)} of {len(images)} images, and "
                f"[{len(images)}, {self.dim or 'D'}] is needed; export it with one feature vector "
                "for each image"
            )
        self.dim = pool.shape[1]
        return Features(torch.from_numpy(pool).to(self._device))


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(
            "features from an ONNX file need the package onnxruntime, which is not installed; run: "
            "pip install 'guided_diffusion_ip[onnx]'"
        ) from None
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _session(runtime: Any, path: str, content: bytes, device: torch.device) -> Any:
    """The model, ready to run with as many threads as torch has."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised as well
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
        providers.insert(
            0, ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0})
        )
    try:
        return runtime.InferenceSession(content, options, providers=providers)
    except _errors(runtime) as error:
        raise ValueError(
            f"{path}: no ONNX model that onnxruntime {runtime.__version__} can run "
            f"({_first_line(error)}); export it again, or update onnxruntime"
        ) from None


def _errors(runtime: Any) -> tuple[type[Exception], ...]:
    """onnxruntime's exceptions, which have no class of their own in common, and those of its Python
    part.
    """
    own = vars(runtime.capi.onnxruntime_pybind11_state).values()
    return (
        *(e for e in own if isinstance(e, type) and issubclass(e, Exception)),
        RuntimeError,
        ValueError,
    )


def _signature(values: list[Any]) -> str:
    return ", ".join(f"{v.name} {v.type} {v.shape}" for v in values) or "nothing"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


# Where tensors are in an ONNX file (onnx.proto): message -> {field: message inside}. Tensors end
# the search.
_ONNX = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


def _refuse_external_data(path: str, content: bytes) -> None:
    """An ONNX file may have its weights in other files, anywhere; the sha256 of a feature space
    would say nothing of them.
    """
    waiting = [("model", memoryview(content))]
    try:
        while waiting:
            kind, message = waiting.pop()
            for number, value in fields(message):
                if kind == "tensor":
                    if number == 14 and value == 1:  # data_location: EXTERNAL
                        raise ValueError(
                            f"{path} has weights in another file; save it as one file "
                            "(onnx.save_model(..., save_as_external_data=False))"
                        )
                elif number in _ONNX[kind] and not isinstance(value, int):
                    waiting.append((_ONNX[kind][number], value))
    except ValueError as error:
        text = str(error)
        raise ValueError(
            text if text.startswith(path) else f"{path}: no ONNX model, or not all of one ({text})"
        ) from None
