"""Any network in an ONNX file as a feature space."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import open_binary
from .onnx_file import refuse_external_data
from .space import Features, as_rgb, image_tensor, size_text


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
        refuse_external_data(path, content)
        self._path, self._device, self._errors = path, device, _errors(runtime)
        self._session = _session(runtime, path, content, device)
        self._input, self._size = self._check_input()
        self.dim = self._check_output()
        self.name = os.path.basename(path)
        self.warnings: list[str] = []
        self._about = {
            "name": self.name,
            "file": self.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "published": None,
            "precision": "fp32",
            "provider": self._session.get_providers()[0],
            "versions": {"torch": torch.__version__, "onnxruntime": runtime.__version__},
        }

    def _check_input(self) -> tuple[str, tuple[int | None, ...]]:
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
            wanted = "x".join(str(n or "any") for n in self._size)
            raise ValueError(
                f"{self._path} takes images of {wanted} (height x width), and "
                f"these have {size_text(images.shape[2:])}; resize them, or "
                "use another feature space"
            )
        try:
            (pool,) = self._session.run(None, {self._input: images.numpy()})
        except self._errors as error:
            raise ValueError(
                f"{self._path} fails on images of {size_text(images.shape)}: {_first_line(error)}"
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
