"""Networks seen as denoisers D(x, sigma): the protocol of EDM's samplers and losses, and Table 1's
preconditionings.

x = y + sigma n is a clean image y with noise of standard deviation sigma, not scaled; D estimates
y. In epsilon terms epsilon = (x - D) / sigma. A preconditioning wraps a network F (Karras et al.
2022, arXiv 2206.00364, Eq. 7):

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

           c_skip       c_out            c_in               c_noise
    edm    s_d^2 / r^2  sigma s_d / r    1 / r              ln(sigma) / 4
    vp     1            -sigma           1/sqrt(sigma^2+1)  (M - 1) t(sigma)
    ve     1            sigma            1                  ln(sigma / 2)
    iddpm  1            -sigma           1/sqrt(sigma^2+1)  M - 1 - argmin_j |u_j - sigma|

with r^2 = sigma^2 + s_d^2.

Shapes: N images, C channels, H x W pixels. sigma is float [N], or one number for all images, above
0 (ln(0) is not finite).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .edm_schedules import VPSchedule, iddpm_levels


class Denoiser(Protocol):
    """What samplers and losses expect of D; a plain object will do, it need not be a module."""

    sigma_min: float  # the noise levels that D was made for; 0 and inf where it has no opinion
    sigma_max: float
    label_dim: int  # number of classes; 0: D takes no labels

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise levels that D knows, in the dtype and shape of `sigma`; themselves if
        it knows all.
        """
        ...

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The estimate of the clean images, float32 [N, C, H, W].

        Args:
            x: noisy images [N, C, H, W].
            sigma: float [N] or 0-dim.
            labels: classes, int64 [N], or float [N, label_dim] (one-hot; a row of zeros: no class).
            augment_labels: float [N, augment_dim]: what was done to each image; None: nothing.
        """
        ...


class BoundDenoiser:
    """A callable with the noise levels of a denoiser, for wrapped denoisers: DDP, torch.compile and
    guidance hide them.

    Args:
        call: call(x, sigma, labels, augment_labels) -> D.
        like: the denoiser that knows the range.
    """

    def __init__(self, call: Callable[..., Tensor], like: Denoiser) -> None:
        self.call = call
        self.sigma_min, self.sigma_max, self.label_dim = (
            like.sigma_min,
            like.sigma_max,
            like.label_dim,
        )
        self.round_sigma = like.round_sigma

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        more = {} if augment_labels is None else {"augment_labels": augment_labels}
        return self.call(x, sigma, labels, **more)


class Coefficients(NamedTuple):
    """Table 1's four, each of the shape of sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioning(nn.Module):
    """D of a network F; subclasses say what the coefficients are.

    Args:
        network: F(x [N, C, H, W], c_noise [N], class_labels=[N, label_dim] or None) ->
            [N, C or more, H, W], of which the first C channels are used; `augment_labels` are
            passed on when given.
        label_dim: number of classes; None: as many as the network has.
        use_fp16: call the network in float16 on CUDA; elsewhere it stays in float32. May be changed
            later.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float,
        sigma_max: float,
        label_dim: int | None = None,
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        self.model = network
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.label_dim = getattr(network, "label_dim", 0) if label_dim is None else label_dim
        self.use_fp16 = use_fp16
        self.use_bf16 = False

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Those of float32 noise levels."""
        raise NotImplementedError(f"{type(self).__name__} must define coefficients")

    def convert_to_fp16(self) -> None:
        """Call the network in float16 on CUDA."""
        self.use_fp16 = True

    def convert_to_bf16(self) -> None:
        """Call the network in bfloat16."""
        self.use_bf16 = True

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise levels that the network knows: sigma itself."""
        return torch.as_tensor(sigma)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """D(x; sigma), float32; see Denoiser.

        Raises:
            ValueError: labels missing, not asked for or (int64 on a CPU) out of range, or shapes
                that do not fit.
        """
        x = x.float()
        class_labels = self.one_hot(labels, len(x))
        c_skip, c_out, c_in, c_noise = self.coefficients(self._per_image(sigma, x))
        half = (
            torch.bfloat16
            if self.use_bf16
            else torch.float16
            if self.use_fp16 and x.device.type == "cuda"
            else None
        )
        scaled = _over_pixels(c_in) * x
        more = {} if augment_labels is None else {"augment_labels": augment_labels}
        # Weights stay float32 in memory; autocast halves them on the way.
        with torch.autocast(x.device.type, half) if half else nullcontext():
            output = self.model(
                scaled.to(half or scaled.dtype), c_noise, class_labels=class_labels, **more
            )
        return _over_pixels(c_skip) * x + _over_pixels(c_out) * output[:, : x.shape[1]].float()

    def _per_image(self, sigma: Tensor, x: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
        if sigma.numel() not in (1, len(x)):
            raise ValueError(
                f"sigma has shape {tuple(sigma.shape)} for {len(x)} images: give one number, or "
                f"one per image, shape ({len(x)},)"
            )
        return sigma.flatten().expand(len(x))

    def one_hot(self, labels: Tensor | None, batch: int) -> Tensor | None:
        """Labels as float32 [batch, label_dim]; None if there are none.

        Raises:
            ValueError: missing, not asked for, of a wrong shape or (int64 on a CPU) out of range.
        """
        if not self.label_dim:
            if labels is not None:
                raise ValueError(
                    "got labels, but this denoiser is unconditional (label_dim 0): leave them "
                    "out, or build it with label_dim (--class_cond True)"
                )
            return None
        wanted = (
            f"give int64 [{batch}] with values 0 to {self.label_dim - 1}, or one-hot rows "
            f"[{batch}, {self.label_dim}]"
        )
        if labels is None:
            raise ValueError(
                f"got no labels, but this denoiser is class-conditional: {wanted}; rows of zeros "
                "stand for no class"
            )
        if labels.shape == (batch, self.label_dim):
            return labels.float()
        if labels.shape != (batch,) or labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)} for {batch} images: "
                f"{wanted}"
            )
        # Reading labels on an accelerator would make the host wait for it at every call.
        if batch and labels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.label_dim:
                raise ValueError(f"labels range from {low} to {high}: {wanted}")
        return F.one_hot(labels.long(), self.label_dim).float()


def _over_pixels(c: Tensor) -> Tensor:
    return c.view(-1, 1, 1, 1)


class EDMPrecond(Preconditioning):
    """EDM's own (Table 1, last column): F sees images of variance 1 and aims at targets of variance
    1.

    Args:
        sigma_data: standard deviation of the data, s_d in the table.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float = 0.5,
        sigma_min: float = 0,
        sigma_max: float = math.inf,
        label_dim: int | None = None,
        use_fp16: bool = False,
    ) -> None:
        if not sigma_data > 0:
            raise ValueError(
                f"sigma_data is {sigma_data}: give the standard deviation of the data, 0.5 for "
                "images in [-1, 1]"
            )
        super().__init__(network, sigma_min, sigma_max, label_dim, use_fp16)
        self.sigma_data = sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        total = torch.hypot(sigma, torch.full_like(sigma, self.sigma_data))
        return Coefficients(
            (self.sigma_data / total) ** 2,
            sigma * self.sigma_data / total,
            1 / total,
            sigma.log() / 4,
        )


class VPPrecond(Preconditioning):
    """Variance preserving, DDPM++ (Song et al. 2021): F predicts the noise at time t of
    beta(t) = beta_d t + beta_min.

    Args:
        M: how many steps the published networks know time by.
        epsilon_t: the least time; sigma_min belongs to it, sigma_max to time 1.
    """

    def __init__(
        self,
        network: nn.Module,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        label_dim: int | None = None,
        use_fp16: bool = False,
    ) -> None:
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        ends = torch.tensor([epsilon_t, 1], dtype=torch.float64, device="cpu")
        sigma_min, sigma_max = VPSchedule(beta_d, beta_min).sigma(ends).tolist()
        super().__init__(network, sigma_min, sigma_max, label_dim, use_fp16)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        # VPSchedule.sigma_inv is more precise. But Fourier features magnify the last digits of
        # c_noise by some hundreds, and published networks have learned from what float32 makes of
        # them in exactly this order.
        t = (
            (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min
        ) / self.beta_d
        return Coefficients(
            torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), (self.M - 1) * t
        )


class VEPrecond(Preconditioning):
    """Variance exploding, NCSN++ (Song et al. 2021): F predicts minus the noise."""

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        label_dim: int | None = None,
        use_fp16: bool = False,
    ) -> None:
        super().__init__(network, sigma_min, sigma_max, label_dim, use_fp16)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            torch.ones_like(sigma), sigma, torch.ones_like(sigma), (sigma / 2).log()
        )


class iDDPMPrecond(Preconditioning):
    """Improved DDPM (Nichol & Dhariwal 2021), ADM: F predicts the noise, and knows the M levels u_j
    of a cosine schedule only.

    F has 2 C outputs; the last C, its variance, are not used here.
    """

    u: Tensor

    def __init__(
        self,
        network: nn.Module,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        label_dim: int | None = None,
        use_fp16: bool = False,
    ) -> None:
        levels = iddpm_levels(M, C_1, C_2)
        super().__init__(network, levels[M - 1], levels[0], label_dim, use_fp16)
        self.M = M
        self.register_buffer("u", torch.tensor(levels, dtype=torch.float32))

    def nearest_index(self, sigma: Tensor) -> Tensor:
        """j with u_j nearest to each noise level, int64, in the shape of `sigma`."""
        sigma = torch.as_tensor(sigma, device=self.u.device)
        return (sigma[..., None] - self.u).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest of the u_j."""
        sigma = torch.as_tensor(sigma)
        return self.u[self.nearest_index(sigma)].to(sigma)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_noise = (self.M - 1 - self.nearest_index(sigma)).to(sigma.dtype)
        return Coefficients(torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), c_noise)


PRECONDITIONINGS: dict[str, type[Preconditioning]] = {
    "edm": EDMPrecond,
    "vp": VPPrecond,
    "ve": VEPrecond,
    "iddpm": iDDPMPrecond,
}
