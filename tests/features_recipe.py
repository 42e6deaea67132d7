"""Seeded synthetic features, of which the published evaluator was asked once:
tests/data/metrics_golden.json (numpy only).

Bit-reproducible on any IEEE-754 machine: only default_rng().random(), + - * / sqrt max,
and a butterfly (Walsh-Hadamard) mix with a fixed order of additions.  No BLAS, no exp/log.

    pool(kind, n)      float32 [n, 2048]   stand-in for pool_3
    spatial(kind, n)   float32 [n, 2023]   stand-in for mixed_6/conv[..., :7] flattened (17,17,7)
    softmax_weight()   float32 [2048, 1008]  (in, out), as softmax/weights of the TF graph
kind is "ref" or "sample".  Rows are a prefix property: pool(kind, n)[:m] == pool(kind, m).
"""

import numpy as np

BLOCK = 500  # rows drawn per generator, so that prefixes agree


def _fwht(x):
    """Unnormalised Walsh-Hadamard transform of the last axis (length a power of two)."""
    n = x.shape[-1]
    h = 1
    while h < n:
        y = x.reshape(x.shape[:-1] + (n // (2 * h), 2, h))
        a = y[..., 0, :] + y[..., 1, :]
        b = y[..., 0, :] - y[..., 1, :]
        x = np.stack((a, b), axis=-2).reshape(x.shape)
        h *= 2
    return x


def _gen(tag, kind, n, relu_mean, relu_mean_spread, gain):
    k = {"ref": 0, "sample": 1}[kind]
    d = 2048
    f = np.random.default_rng([2024, tag, 99])  # shared by ref and sample
    signs = np.where(f.random(d) < 0.5, -1.0, 1.0)
    scale = f.random(d) * 0.8 + 0.6  # per-feature scale, after mixing
    mean = relu_mean + relu_mean_spread * (f.random(d) - 0.5)
    spec = 1.0 / np.sqrt(np.arange(d, dtype=np.float64) + 1.0)
    centres = (f.random((20, d)) - 0.5) * 3.0  # 20 clusters in the latent space
    if k == 1:  # the sample set: shifted, narrower, partly other clusters
        g = np.random.default_rng([2024, tag, 98])
        mean = mean + 0.04 * (g.random(d) - 0.5)
        spec = spec * 0.97
        centres = np.concatenate(
            [centres[:13], (g.random((7, d)) - 0.5) * 3.6]
        )  # 7 clusters of its own
    out = np.empty((n, d), np.float32)
    for b0 in range(0, n, BLOCK):
        r = np.random.default_rng([2024, tag, k, b0 // BLOCK])
        u = (
            r.random((BLOCK, d))
            + r.random((BLOCK, d))
            + r.random((BLOCK, d))
            + r.random((BLOCK, d))
            - 2.0
        )
        z = u * 1.7320508075688772  # ~N(0,1): sum of 4 uniforms
        c = r.integers(0, 20, BLOCK)
        z = (z + centres[c]) * spec * signs
        y = _fwht(z) * gain * scale + mean
        m = min(BLOCK, n - b0)
        out[b0 : b0 + m] = np.maximum(y[:m], 0.0).astype(np.float32)
    return out


def pool(kind, n):
    return _gen(1, kind, n, 0.40, 0.5, 0.10)


def spatial(kind, n):
    return _gen(2, kind, n, 0.05, 0.6, 0.30)[:, :2023].copy()


def softmax_weight():
    r = np.random.default_rng([2024, 3])
    return ((r.random((2048, 1008)) - 0.5) * 0.5).astype(np.float32)
