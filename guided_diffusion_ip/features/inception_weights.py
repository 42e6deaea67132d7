"""Where the weights of the Inception network are, and how they get into memory. Nothing is
downloaded unless asked for.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import dist_util
from ..files import atomic_file, open_binary, sha256
from . import inception, tf_graph

PUBLISHED_NAME = "weights-inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{PUBLISHED_NAME}"
URL_TF = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
    "classify_image_graph_def.pb"
)
ENVIRONMENT = "GUIDED_DIFFUSION_IP_INCEPTION"


class Weights(NamedTuple):
    """A weights file, read.

    state: everything of `inception.parameter_shapes()`, float32.
    kind: "pth" (PyTorch) or "pb" (TensorFlow).
    published: has the published hash; None for a TensorFlow graph, whose hash is not known.
    """

    state: dict[str, Tensor]
    sha256: str
    kind: str
    published: bool | None

    @property
    def status(self) -> str:
        """In words, for reports."""
        if self.published is None:
            return "TF graph, hash not known"
        return "the published weights" if self.published else "not the published weights"


def cache_path() -> str:
    """Where a download goes, and is found again."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "guided_diffusion_ip", PUBLISHED_NAME)


def resolve(
    path: str = "", *, allow_download: bool = False, log: Callable[[str], object] = print
) -> str:
    """The weights file: `path`, else the environment's GUIDED_DIFFUSION_IP_INCEPTION, else the
    user's cache, else a download.

    No collective is inside. Of several processes that share a cache, let one call it first.

    Raises:
        ValueError: a file that was named is not there; none was found and downloads are not
            allowed; a download failed.
    """
    named = (
        (path, "--inception_weights"),
        (os.environ.get(ENVIRONMENT, ""), f"the environment variable {ENVIRONMENT}"),
    )
    for found, source in named:
        if found:
            if not os.path.isfile(found):
                raise ValueError(
                    f"{source} names {found}, which is not a file of this machine; {_advice()}"
                )
            return found
    cached = cache_path()
    if not os.path.isfile(cached):
        if not allow_download:
            raise ValueError(
                f"the weights of the Inception network are not here; {_advice()}; or --download "
                "lets this program fetch it (95 MB)"
            )
        _download(cached, log)
    return cached


def _advice() -> str:
    return (
        f"get {URL} (sha256 {PUBLISHED_SHA256}) or ADM's TensorFlow graph {URL_TF}, "
        f"and name the file by --inception_weights PATH or the environment variable {ENVIRONMENT}, "
        f"or put the former at {cache_path()}"
    )


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to https only."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not newurl.startswith("https://"):
            raise OSError(f"it leads to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(path: str, log: Callable[[str], object]) -> None:
    """Fetches URL to `path`, whole and with the published hash or not at all."""
    log(f"downloading {URL} to {path}")
    digest, size = hashlib.sha256(), 0
    try:
        opener = urllib.request.build_opener(_SafeRedirects)
        with opener.open(URL, timeout=60) as response, atomic_file(path) as file:
            promised = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=promised or None, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                    bar.update(len(chunk))
            if size < promised:
                raise OSError(f"the connection ended after {size} of {promised} bytes")
            if digest.hexdigest() != PUBLISHED_SHA256:
                raise OSError(
                    f"what came has the sha256 {digest.hexdigest()}, not the published one, and "
                    "was removed"
                )
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"the download failed ({error or type(error).__name__}): try again, or {_advice()}"
        ) from None


def load(path: str | os.PathLike) -> Weights:
    """Reads a PyTorch checkpoint (a state_dict, nothing that could run code) or a frozen TensorFlow
    graph; its content decides.

    Entries that the network does not have (AuxLogits, counters of training steps) are left alone.

    Raises:
        ValueError: damaged, of another kind, or without one of the network's parameters in its
            shape.
    """
    name = os.fspath(path)
    with open_binary(name) as file:
        # Field 1 of a GraphDef; checkpoints are zip archives or pickles.
        kind = "pb" if file.read(1) == b"\n" else "pth"
    if kind == "pb":
        found = tf_graph.read_inception(name)
    else:
        found = dist_util.load_state_dict(name)
    found = found if isinstance(found, dict) else {}
    shapes = inception.parameter_shapes()
    if wrong := [
        f"{key} {_found(found.get(key))}, needs {list(shape)}"
        for key, shape in shapes.items()
        if not _fits(found.get(key), shape)
    ]:
        raise ValueError(
            f"{name} does not hold the Inception network of 2015-12-05 ({len(wrong)} of "
            f"{len(shapes)} parameters; {'; '.join(wrong[:3])}); {_advice()}"
        )
    # Only now are a graph's arrays copied: their shapes are known to be sane.
    state = {key: _tensor(found[key]) for key in shapes}
    digest = sha256(name)
    return Weights(state, digest, kind, None if kind == "pb" else digest == PUBLISHED_SHA256)


def _fits(value: object, shape: tuple[int, ...]) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and tuple(value.shape) == shape
    return isinstance(value, np.ndarray) and value.shape == shape


def _found(value: object) -> str:
    if value is None:
        return "is missing"
    return f"is {list(value.shape)}" if hasattr(value, "shape") else "is no tensor"


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.from_numpy(value.astype(np.float32, order="C"))
    return value.float()
