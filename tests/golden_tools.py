"""Inputs and weights that can be made again anywhere, as a function of (seed, name, shape).

The published implementation was run once on such inputs and weights; its answers are in tests/data.
Every array has a generator of its own, keyed by the seed and the CRC-32 of its name, so that none
depends on the order in which they are made.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SEED = 20230211
DATA = Path(__file__).parent / "data"


def _normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    key = zlib.crc32(name.encode())
    return np.random.default_rng([seed, key]).standard_normal(shape)


def seeded_normal(name: str, shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """Standard normal numbers, float32."""
    return torch.from_numpy(_normal(name, shape, seed).astype(np.float32))


def seeded_image(name: str, shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """Numbers in (-1, 1), float32: tanh of normal ones."""
    return torch.from_numpy(np.tanh(_normal(name, shape, seed)).astype(np.float32))


def seeded_weight(name: str, shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """A parameter that keeps activations of order one.

    Matrices and kernels have variance 1 / fan-in; vectors have std 0.1, around 1 for `*weight` (the
    gains of norms) and around 0 for all others.
    """
    values = _normal(name, shape, seed)
    if len(shape) > 1:
        values = values / np.sqrt(np.prod(shape[1:]))
    else:
        values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
    return torch.from_numpy(values.astype(np.float32))


def load_seeded_weights(model: torch.nn.Module, seed: int = SEED) -> torch.nn.Module:
    """Give every entry of the state_dict its seeded weight; returns the model in eval mode."""
    entries = model.state_dict().items()
    model.load_state_dict({name: seeded_weight(name, tuple(v.shape), seed) for name, v in entries})
    return model.eval()


def seeded_checkpoint(path: Path, model: torch.nn.Module) -> str:
    """Write the model's seeded weights, of no merit but all with an effect, to `path`;
    returns it.
    """
    torch.save(load_seeded_weights(model).state_dict(), path)
    return str(path)


def state_dict_lines(model: torch.nn.Module) -> list[str]:
    """`name 128x3x3x3` for every entry of the state_dict, in order: what checkpoints rely on."""
    return [f"{name} {'x'.join(map(str, v.shape))}" for name, v in model.state_dict().items()]


def relative_error(got: Tensor, want: np.ndarray) -> float:
    """|got - want| / |want|, Euclidean norms in float64."""
    difference = got.detach().double().numpy() - want
    return float(np.linalg.norm(difference) / np.linalg.norm(want))
