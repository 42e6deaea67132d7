"""The loops that drive a chain from its noisy to its clean end."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..epsilon_scaling import warn_if_unclipped
from ..process import Network, RandnLike
from .paths import LevelT, SamplingPath, Step

if TYPE_CHECKING:
    from ..gaussian_diffusion import GaussianDiffusion
    from . import Solver

Output = dict[str, Tensor]
StepT = TypeVar("StepT")


def run(
    solver: Solver,
    path: SamplingPath[LevelT],
    noise: Tensor,
    randn_like: RandnLike = torch.randn_like,
    progress: bool = False,
    **options: Any,
) -> Iterator[Step[LevelT]]:
    """Yields each step of `solver` along `path`.

    Args:
        noise: standard normal, [N, C, H, W], from which the chain starts.
        randn_like: called once per step that uses noise.
        options: those of the solver's step.
    """
    x = path.start(noise)
    here = path.level(path.num_steps - 1, x)
    previous: Step[LevelT] | None = None
    for index in _bar(range(path.num_steps - 1, -1, -1), progress):
        there = path.level(index - 1, x)
        with torch.no_grad():
            previous = solver.step(path, x, here, there, previous, randn_like, **options)
        yield previous
        x, here = previous.x, previous.level


def last_of(steps: Iterator[StepT]) -> StepT:
    """The last of them; no other is kept."""
    *_, last = collections.deque(steps, maxlen=1)
    return last


def chain_of_verbs(
    process: GaussianDiffusion,
    step: Callable[..., Output],
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None = None,
    progress: bool = False,
    randn_like: RandnLike | None = None,
    **options: Any,
) -> Iterator[Output]:
    """Apply `step`, a method of the process such as p_sample, from t = T-1 to 0, starting from
    `noise` [N, C, H, W] or a fresh draw of `shape`.
    """
    if noise is not None and tuple(noise.shape) != tuple(shape):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, but samples of shape {tuple(shape)} were asked "
            "for"
        )
    warn_if_training(model)
    if process.scales_epsilon and not options.get("clip_denoised", True):
        warn_if_unclipped(process)
    device = torch.device(device) if device is not None else _device_of(model)
    if noise is None:
        noise = (randn_like or torch.randn_like)(torch.empty(*shape, device=device))
    x = noise.to(device)
    for index in _bar(range(process.num_timesteps - 1, -1, -1), progress):
        t = torch.full((shape[0],), index, device=device, dtype=torch.int64)
        with torch.no_grad():
            out = step(model, x, t, randn_like=randn_like, **options)
        yield out
        x = out["sample"]


def warn_if_training(model: object) -> None:
    """Warn of a network in training mode whose dropout is active: its samples are worse, and differ
    from call to call.

    Args:
        model: a module, or what holds one as `model` or `call` (denoisers, guidance); others cannot
            be looked into.
    """
    network = (
        model
        if isinstance(model, torch.nn.Module)
        else getattr(model, "model", getattr(model, "call", None))
    )
    if not isinstance(network, torch.nn.Module):
        return
    for part in network.modules():
        rate = (
            part.p
            if isinstance(part, torch.nn.modules.dropout._DropoutNd)
            else getattr(part, "label_dropout", 0)
        )
        if part.training and rate:
            warnings.warn(
                "sampling from a network in training mode, in which dropout is active: call "
                "model.eval() first",
                stacklevel=3,
            )
            return


def _bar(indices: range, progress: bool) -> Iterable[int]:
    if not progress:
        return indices
    from tqdm.auto import tqdm  # only whoever wants a bar pays for it

    return tqdm(indices, desc="sampling", unit="step", leave=False)


def _device_of(model: Network) -> torch.device:
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")
