"""EDM's non-leaky augmentation: random geometry that the denoiser is told of, so that it need not
appear in samples.

Karras et al. 2022 (arXiv 2206.00364), appendix F.2; transforms as in Karras et al. 2020 (arXiv
2006.06676), appendix B. Labels are zero for an image that nothing was done to, which is what
sampling asks the network for.

A pure function of given uniform numbers, vectorised over images, with no wait for the device. It
differs from the published implementation in the filter: there, images are enlarged and reduced by a
sym6 wavelet around a bilinear warp; here they are warped once by torch's bicubic interpolation,
after a Gaussian blur where the warp shrinks. Edges are mirrored about the border of the outermost
pixels rather than their centres. Flips, whole pixels and quarter turns are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

_BLUR_REACH = 3  # pixels either side: shrinking by more than about 2 would want more
# Columns of the uniforms.
_XFLIP, _YFLIP, _SCALE, _ROTATE, _ANISO, _ANISO_AXIS, _TRANSLATE = 0, 1, 2, 4, 6, 8, 10


@dataclass(frozen=True)
class Augmentation:
    """augmentation(images, uniforms) -> (images, labels). The defaults are the published CIFAR-10
    settings.

    Each transform happens with probability min(1, p * its strength), independently of the others,
    in this order: mirrored left to right, upside down (each in half of these cases: xflip is so
    large that it is always on), scaled, turned, stretched along an axis, moved.

    Args:
        p: in [0, 1]; published 0.12 and 0.15. 0 switches everything off.
        scale_std: std of log2 of the scale. rotate_frac_max: largest angle / pi.
        aniso_std: std of log2 of the stretch. aniso_rotate_prob: how often its axis is not the
            horizontal.
        translate_frac_std: std of the shift / image size.

    Raises:
        ValueError: p outside [0, 1], or a negative strength.
    """

    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1.0
    scale: float = 1.0
    rotate_frac: float = 1.0
    aniso: float = 1.0
    translate_frac: float = 1.0
    scale_std: float = 0.2
    rotate_frac_max: float = 1.0
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125

    uniforms: ClassVar[int] = 13
    label_dim: ClassVar[int] = 9

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(
                f"augment (p) is a probability in [0, 1], got {self.p:g}: 0 switches it off, "
                "published 0.12 and 0.15"
            )
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"{name} of the augmentation must be 0 or positive, got {value:g}: 0 switches "
                    "it off"
                )

    def __call__(self, images: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Transform images [N, C, H, W] by uniforms [N, 13] in [0, 1).

        Returns:
            images, same shape, unchanged where nothing happens; labels [N, 9] float32: mirrored
            left to right, upside down (0 or 1), log2 scale / scale_std, cos(angle) - 1, sin(angle)
            (counter-clockwise), log2 stretch / aniso_std times cos and sin of its axis, shift to
            the right and down / (size * translate_frac_std).
        """
        expected = (len(images), self.uniforms)
        assert uniforms.shape == expected, (
            f"uniforms must be {expected}, got {tuple(uniforms.shape)}"
        )
        u = uniforms.double().clamp(2.0**-33, 1 - 2.0**-33)
        flips = [
            u[:, _XFLIP] < self._chance(self.xflip) / 2,
            u[:, _YFLIP] < self._chance(self.yflip) / 2,
        ]
        for flip, dim in zip(flips, (3, 2)):
            images = torch.where(_per_image(flip), images.flip(dim), images)

        moved, jacobian, shift, moves = self._geometry(u)
        labels = torch.stack([flip.double() for flip in flips] + moves, dim=1)
        size = torch.tensor([images.shape[3], images.shape[2]], dtype=u.dtype).to(
            u.device, non_blocking=True
        )
        offset = -(jacobian @ (shift * size).unsqueeze(2)).squeeze(2)
        with torch.autocast(images.device.type, enabled=False):  # half precision is for the network
            warped = warp(_blurred(images, _largest_stretch(jacobian)), jacobian, offset)
        return torch.where(_per_image(moved), warped, images), labels.float()

    def _chance(self, strength: float) -> float:
        return min(1.0, self.p * strength)

    def _geometry(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """What happens besides flips: whether [N], d(input)/d(output) [N, 2, 2],
        shift / size [N, 2], seven labels [N].
        """

        def where(column: int, strength: float, value: Tensor) -> Tensor:
            happens.append(u[:, column] < self._chance(strength))
            return torch.where(happens[-1], value, 0.0)

        happens: list[Tensor] = []
        scale = where(_SCALE, self.scale, torch.special.ndtri(u[:, _SCALE + 1]))
        angle = where(
            _ROTATE, self.rotate_frac, (2 * u[:, _ROTATE + 1] - 1) * math.pi * self.rotate_frac_max
        )
        stretch = where(_ANISO, self.aniso, torch.special.ndtri(u[:, _ANISO + 1]))
        axis = torch.where(
            u[:, _ANISO_AXIS] < self.aniso_rotate_prob,
            (2 * u[:, _ANISO_AXIS + 1] - 1) * math.pi,
            0.0,
        )
        across, down = (
            where(_TRANSLATE, self.translate_frac, torch.special.ndtri(u[:, _TRANSLATE + k]))
            for k in (1, 2)
        )

        factor, narrow = torch.exp2(scale * self.scale_std), torch.exp2(stretch * self.aniso_std)
        squeeze = torch.diag_embed(torch.stack([1 / narrow, narrow], dim=1))
        jacobian = (
            _rotation(angle) @ _rotation(-axis) @ squeeze @ _rotation(axis) / factor.view(-1, 1, 1)
        )
        labels = [
            scale,
            angle.cos() - 1,
            angle.sin(),
            stretch * axis.cos(),
            stretch * axis.sin(),
            across,
            down,
        ]
        shift = torch.stack([across, down], dim=1) * self.translate_frac_std
        return torch.stack(happens).any(0), jacobian, shift, labels


def warp(images: Tensor, jacobian: Tensor, offset: Tensor) -> Tensor:
    """Images [N, C, H, W] with output pixel p taken from input position jacobian p + offset, by
    bicubic interpolation.

    Positions (x to the right, y down) are in pixels from the image's centre; jacobian [N, 2, 2],
    offset [N, 2].
    """
    n, _, height, width = images.shape
    half = torch.tensor([width / 2, height / 2], dtype=jacobian.dtype).to(
        images.device, non_blocking=True
    )
    theta = torch.cat([jacobian * half / half.unsqueeze(1), (offset / half).unsqueeze(2)], dim=2)
    grid = F.affine_grid(theta, [n, 1, height, width], align_corners=False)
    return F.grid_sample(
        images,
        grid.to(images.dtype),
        mode="bicubic",
        padding_mode="reflection",
        align_corners=False,
    )


def _rotation(angle: Tensor) -> Tensor:
    """[N, 2, 2]: clockwise by `angle` for whoever looks at it (y points down)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)


def _largest_stretch(jacobian: Tensor) -> Tensor:
    """The larger singular value, [N]: how many input pixels one output pixel spans."""
    squares = (jacobian**2).sum((1, 2))
    det = jacobian[:, 0, 0] * jacobian[:, 1, 1] - jacobian[:, 0, 1] * jacobian[:, 1, 0]
    return ((squares + (squares**2 - 4 * det**2).clamp(min=0).sqrt()) / 2).sqrt()


def _blurred(images: Tensor, span: Tensor) -> Tensor:
    """Each image through a Gaussian that leaves little to alias when `span` [N] > 1 input pixels
    fall on one; else unchanged.
    """
    n, c, height, width = images.shape
    taps = torch.arange(-_BLUR_REACH, _BLUR_REACH + 1, device=images.device, dtype=span.dtype)
    std = 0.5 * (span**2 - 1).clamp(min=1e-3).sqrt()  # at the least, neighbours have weight 0
    kernel = torch.exp(-0.5 * (taps / std.unsqueeze(1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(images.dtype).repeat_interleave(c, dim=0)
    planes = images.reshape(1, n * c, height, width)
    for shape, padding in (
        ((-1, 1, 1, len(taps)), (_BLUR_REACH, _BLUR_REACH, 0, 0)),
        ((-1, 1, len(taps), 1), (0, 0, _BLUR_REACH, _BLUR_REACH)),
    ):
        planes = F.conv2d(
            F.pad(planes, padding, mode="replicate"), kernel.view(shape), groups=n * c
        )
    return planes.view(n, c, height, width)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
