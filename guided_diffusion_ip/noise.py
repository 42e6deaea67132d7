"""Random numbers with an address: the same on any device, batch size and number of processes.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key
and a counter into four 32-bit words. Here
    key     = the seed, two 32-bit words;
    counter = (block of four numbers inside the array, step, index, stream).
Every number therefore has an address of its own, and no generator state exists that would have to
be saved: to resume, ask for the same address. Nothing is hashed into the key, so two addresses
never meet.

`index` is whatever names the array: the image's number when sampling, its position in the global
batch when training. Integer words are equal on all devices; normals are equal up to the rounding of
log, cos and sin.
"""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Blocks per pass on a CPU: its six working arrays (8 bytes a block) then stay in the cache.
_CPU_BLOCKS = 1 << 14


class Stream(enum.IntEnum):
    """What a number is used for.

    The values are part of reproducibility: never renumber, only append.
    """

    TIMESTEP = 0
    EPSILON = 1
    XI = 2
    FLIP = 3
    CROP = 4
    SHUFFLE = 5
    LABEL = 6
    SAMPLE = 7
    CHAIN = 8
    LIKELIHOOD = 9
    CLASS_DROPOUT = 10
    MEASURE_INPUT = 11
    MEASURE_STEP = 12
    AUGMENT = 13


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox on 32-bit words held in int64 tensors.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2**32);
            they are not changed.
        key: two words in [0, 2**32), ints or int64 tensors that broadcast with the counter.

    Returns: four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    shape = torch.broadcast_shapes(
        *(word.shape for word in (*counter, *key) if isinstance(word, Tensor))
    )
    k0, k1 = key
    c0, c1, c2, c3 = counter
    # Before two rounds have mixed all four words, most are one row or one column only: cheap.
    for _ in range(2):
        # 32 x 32 -> 64 bits: int64 products wrap and so keep exactly the bits wanted; `>>` drags
        # the sign along, hence the masks.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, ((p0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    c0, c1, c2, c3 = (word.expand(shape).contiguous() for word in (c0, c1, c2, c3))
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(_ROUNDS - 2):  # the same round in place
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(p0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, p1 = p1.bitwise_and_(_MASK), c1
        c3, p0 = p0.bitwise_and_(_MASK), c3
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(
    seed: int,
    stream: int,
    index: Tensor | Sequence[int],
    step: int,
    shape: Sequence[int] = (),
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform float32 [N, *shape] in [0, 1), multiples of 2**-24.

    Args:
        seed: in [0, 2**64). stream: a Stream. step: in [0, 2**32).
        index: a range, int64 [N] or a sequence of ints, each in [0, 2**32). A range is made where
            the numbers are: a GPU is not waited for. A tensor is read to be checked, and copied if
            it is elsewhere; both make the host wait for a GPU.
        device: of the result; the index's device if it is a tensor, else the CPU.

    Raises:
        ValueError: an address out of range.
    """
    return _draw(_uniform_of_words, seed, stream, _checked_index(index, device), step, shape)


def normal(
    seed: int,
    stream: int,
    index: Tensor | Sequence[int],
    step: int,
    shape: Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal float32 [N, *shape] by Box-Muller, |value| < 6.8; arguments as for `uniform`.

    The radius comes from all 32 bits of a word, converted so that small uniforms keep their
    relative precision (they make the tails) and never are 0. Cost on one CPU core: about 15 ns per
    number, 5 ms for 100 images of 3 x 32 x 32 (torch.randn: 3 ns). On a GPU one pass of about 150
    small kernels, with 16 bytes of working memory per number.

    Raises:
        ValueError: an address out of range.
    """
    return _draw(_normal_of_words, seed, stream, _checked_index(index, device), step, shape)


def integers(
    seed: int,
    stream: int,
    index: Tensor | Sequence[int],
    step: int,
    high: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform int64 [N] in [0, high); other arguments as for `uniform`.

    64 random bits modulo high: no value is favoured by more than a factor 1 + 2**-32.

    Raises:
        ValueError: high outside [1, 2**31], or an address out of range.
    """
    if not 1 <= high <= 1 << 31:
        raise ValueError(f"high={high} must lie in [1, 2**31]: the number of values to choose from")
    w0, w1, _, _ = _words(seed, stream, _checked_index(index, device), step, 1)
    # (w0 * 2**32 + w1) mod high, in steps that stay below 2**63.
    return ((w0 % high) * ((1 << 32) % high) + w1).remainder_(high)[:, 0]


def permutation(seed: int, stream: int, epoch: int, n: int) -> Tensor:
    """A random order of 0 .. n-1, int64 [n] on the CPU: stable argsort of 62-bit random keys.

    `epoch` takes the place of the step (and index is 0). 1.3 million numbers take about 0.2 s.

    Raises:
        ValueError: an address out of range, or n negative.
    """
    if n < 0:
        raise ValueError(f"n={n} cannot be the length of a permutation: it must be 0 or more")
    words = _words(seed, stream, torch.zeros(1, dtype=torch.int64), epoch, (n + 1) // 2)
    keys = torch.stack([(words[0] >> 2 << 32) | words[1], (words[2] >> 2 << 32) | words[3]], dim=-1)
    return torch.argsort(keys.reshape(-1)[:n], stable=True)


class NormalStream:
    """A `randn_like` with an address: call number s draws step s of each image's own noise.

    Args:
        seed: in [0, 2**64). stream: a Stream.
        index: int64 [N] or a sequence of ints: the numbers of the images in this batch.

    `step` counts the calls (0, 1, 2, ...) and may be set, to resume in the middle of a chain.

    Raises:
        ValueError: an address out of range.
    """

    def __init__(self, seed: int, stream: int, index: Tensor | Sequence[int]) -> None:
        self.seed = seed
        self.stream = stream
        self.step = 0
        self._index = _checked_index(index, None)
        _key(seed)

    def __call__(self, x: Tensor) -> Tensor:
        """Standard normal numbers [N, ...] with x's shape, device and dtype.

        Raises:
            ValueError: x does not hold one row per index.
        """
        if x.ndim == 0 or x.shape[0] != len(self._index):
            raise ValueError(
                f"x has shape {list(x.shape)}, but this stream names {len(self._index)}"
                " images: the first dimension must equal len(index)"
            )
        if self._index.device != x.device:
            self._index = self._index.to(x.device)  # once; its range has been checked
        noise = _draw(_normal_of_words, self.seed, self.stream, self._index, self.step, x.shape[1:])
        self.step += 1
        return noise.to(x.dtype)


def _key(seed: int) -> tuple[int, int]:
    seed = operator.index(seed)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} must lie in [0, 2**64)")
    return seed & _MASK, seed >> 32


def _checked_index(index: Tensor | Sequence[int], device: torch.device | str | None) -> Tensor:
    """The index as int64 [N], on `device`; None: where it is."""
    if device is None:
        device = index.device if isinstance(index, Tensor) else "cpu"
    if isinstance(index, range) and len(index):
        _check_bounds(min(index[0], index[-1]), max(index[0], index[-1]))
        return torch.arange(index.start, index.stop, index.step, dtype=torch.int64, device=device)
    index = torch.as_tensor(index)
    if index.numel() == 0:
        index = index.to(torch.int64)  # an empty list is float for torch
    if index.ndim != 1 or index.dtype not in _INTEGERS:
        raise ValueError(
            f"index must be one-dimensional and of integers, got {index.dtype} {list(index.shape)}"
        )
    index = index.to(torch.int64)
    if index.numel():
        _check_bounds(*(int(bound) for bound in torch.aminmax(index)))
    return index.to(device)


def _check_bounds(low: int, high: int) -> None:
    if low < 0 or high > _MASK:
        raise ValueError(f"index runs from {low} to {high}, but must lie in [0, 2**32)")


def _words(
    seed: int, stream: int, index: Tensor, step: int, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four tensors [N, blocks] of 32-bit words: number 4 b + w of image i is tensor w at [i, b]."""
    step = operator.index(step)
    if not 0 <= step <= _MASK:
        raise ValueError(f"step={step} must lie in [0, 2**32)")
    if blocks > _MASK:
        raise ValueError(f"{4 * blocks} numbers per index are too many: the limit is 2**34")
    block = torch.arange(blocks, dtype=torch.int64, device=index.device)[None]
    step_word, stream_word = (
        torch.full((1, 1), value, dtype=torch.int64, device=index.device)
        for value in (step, int(stream))
    )
    return philox4x32((block, step_word, index[:, None], stream_word), _key(seed))


def _draw(
    convert: Callable[[tuple[Tensor, ...], Tensor], None],
    seed: int,
    stream: int,
    index: Tensor,
    step: int,
    shape: Sequence[int],
) -> Tensor:
    """Words turned into floats [N, *shape]: at once on a GPU, by cache-sized groups on a CPU."""
    count = math.prod(shape)
    blocks = -(-count // 4)
    out = torch.empty(len(index), blocks, 4, dtype=torch.float32, device=index.device)
    rows = max(1, len(index))
    if index.device.type == "cpu":
        rows = max(1, _CPU_BLOCKS // max(1, blocks))
    for start in range(0, len(index), rows):
        part = slice(start, start + rows)
        convert(_words(seed, stream, index[part], step, blocks), out[part])
    return out.view(len(index), 4 * blocks)[:, :count].reshape(len(index), *shape).contiguous()


def _uniform_of_words(words: tuple[Tensor, ...], out: Tensor) -> None:
    for k, word in enumerate(words):
        # 24 bits are exact in float32, so this never rounds up to 1.
        out[..., k] = (word >> 8).to(torch.float32).mul_(2.0**-24)


def _normal_of_words(words: tuple[Tensor, ...], out: Tensor) -> None:
    for k in (0, 2):
        # (w + 1/2) / 2**32 in (0, 1]: 24 significant bits are kept, however small w is.
        radius = words[k].to(torch.float32).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = words[k + 1].to(torch.float32).mul_(2.0 * math.pi * 2.0**-32)
        # Contiguous temporaries: torch's strided cos and sin may round differently.
        out[..., k] = torch.cos(angle).mul_(radius)
        out[..., k + 1] = angle.sin_().mul_(radius)
