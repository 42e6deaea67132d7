"""Dynamic thresholding of x_0_hat (Saharia et al. 2022, Imagen, Section 2.3): against saturated
images under strong guidance.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def dynamic_threshold(share: float) -> Callable[[Tensor], Tensor]:
    """A denoised_fn: x_0_hat [N, C, H, W], clamped to [-s, s] and divided by s.

    s, of each image, is the quantile `share` of |x_0_hat|, at least 1: what lies in [-1, 1] already
    stays as it is.

    Raises:
        ValueError: a share that is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"--dynamic_threshold {share:g} is a share of the pixels: give one above 0 and up to "
            "1, such as 0.995"
        )

    def thresholded(x_start: Tensor) -> Tensor:
        magnitudes = x_start.detach().abs().flatten(1).float()
        s = magnitudes.quantile(share, dim=1).clamp(min=1).to(x_start.dtype)
        s = s.view(-1, *[1] * (x_start.ndim - 1))
        return x_start.clamp(-s, s) / s

    return thresholded
