"""A denoiser D(x, sigma) from a process and its network, so that EDM's samplers run ADM's
checkpoints.

Karras et al. 2022 (arXiv 2206.00364), appendix C.3: with sigma = sqrt((1 - ab) / ab),
x = y + sigma n is x_t / sqrt(ab), and
    D(x, sigma) = x - sigma epsilon(sqrt(ab) x, t).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .kinds import ModelMeanType
from .process import Network

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion


class ProcessDenoiser:
    """D(x, sigma, labels) of a network that belongs to `process`.

    The process's own lambda is never applied: the sampler has its own, and two would multiply. Nor
    is the answer clipped: the clip comes after lambda, so it is the sampler's as well.

    Args:
        process: a GaussianDiffusion or SpacedDiffusion, whatever its network predicts; few steps
            are few noise levels.
        model: model(x_t, t, **model_kwargs), as for the process.
        interpolate: ask the network at a t between two steps for a sigma between theirs (linear in
            log sigma). Otherwise `round_sigma` gives the nearest step's level (in log sigma), one
            that the network was trained on.
        model_kwargs: given to the network with each call.
        label_dim: how many classes the network knows; 0: none.
        null_label: what the network was taught to take for "no class"; None if nothing.

    Raises:
        ValueError: interpolation of a network that predicts x_{t-1} (it has no step in between), or
            of a process of one step.
    """

    def __init__(
        self,
        process: GaussianDiffusion,
        model: Network,
        interpolate: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        label_dim: int = 0,
        null_label: int | None = None,
    ) -> None:
        sigmas = process.sqrt_recipm1_alphas_cumprod
        sigmas = sigmas[np.isfinite(sigmas)]  # a last beta of 1 leaves no signal to scale by
        if interpolate and process.model_mean_type is ModelMeanType.PREVIOUS_X:
            raise ValueError(
                "interpolate=True needs a network that predicts epsilon or x_0, this one predicts "
                "x_{t-1}: use interpolate=False"
            )
        if interpolate and len(sigmas) < 2:
            raise ValueError(
                f"interpolate=True needs two noise levels or more, this process has {len(sigmas)}"
            )
        self.process = process
        self.model = model
        self.interpolate = interpolate
        self.model_kwargs = dict(model_kwargs or {})
        self.label_dim = label_dim
        self.null_label = null_label
        self._checked: Tensor | None = None
        self.sigma_min, self.sigma_max = float(sigmas[0]), float(sigmas[-1])
        self._sigmas = torch.from_numpy(sigmas)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The noise levels [...] that D can be asked at, nearest to sigma [...]."""
        sigma = torch.as_tensor(sigma)
        if self.interpolate:
            return sigma.clamp(self.sigma_min, self.sigma_max)
        return self._grid(sigma.device)[0][self._nearest(sigma)].to(
            sigma.dtype if sigma.is_floating_point() else torch.float64
        )

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The estimate of y, in x's shape and dtype; the network gets float32.

        Args:
            x: y + sigma n, [N, C, H, W]. sigma: [N] or a number, within sigma_min .. sigma_max.
            labels: int64 [N], or one-hot [N, classes], a row of zeros being no class; given to the
                network as y, int64 [N].
            augment_labels: accepted, as for any denoiser, and not used.

        Raises:
            ValueError: a row of zeros, and the network has no null label.
        """
        sigma = torch.as_tensor(sigma, device=x.device).double().expand(x.shape[0])
        spread = sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        kwargs = dict(self.model_kwargs)
        if labels is not None:
            kwargs["y"] = self._numbers(labels) if labels.ndim == 2 else labels
        x_t = (x / (1 + spread**2).sqrt()).float()
        t = self._nearest(sigma)
        model = self._between_steps(sigma) if self.interpolate else self.model
        output = self.process.call_model(model, x_t, t, kwargs)[:, : x.shape[1]].to(x.dtype)

        if self.process.model_mean_type is ModelMeanType.EPSILON:
            return x - spread * output
        if self.process.model_mean_type is ModelMeanType.START_X:
            return output
        return self.process.xstart_from_xprev(x_t.to(x.dtype), t, output)

    def _numbers(self, rows: Tensor) -> Tensor:
        """The classes, int64 [N], of one-hot rows [N, classes]; rows of zeros: the null label."""
        has_class = (rows != 0).any(1)
        # All steps of a sampler share their labels: the host waits for a GPU once, not each time.
        if self.null_label is None and rows is not self._checked:
            without = len(rows) - int(has_class.sum())
            if without:
                raise ValueError(
                    f"{without} of {len(rows)} rows of labels are zeros, which stands for "
                    "no class, and this network has no label for that: give each image a "
                    "class, or null_label= of a network trained with one"
                )
            self._checked = rows
        null = -1 if self.null_label is None else self.null_label
        return torch.where(has_class, rows.argmax(1), null)

    def _between_steps(self, sigma: Tensor) -> Network:
        """The network, told a float t as it wants it, [N], that lies between those of the two steps
        around sigma [N].
        """
        _, logs, _ = self._grid(sigma.device)
        log_sigma = sigma.log()
        below = (torch.searchsorted(logs, log_sigma, right=True) - 1).clamp(0, len(logs) - 2)
        share = ((log_sigma - logs[below]) / (logs[below + 1] - logs[below])).clamp(0, 1)
        # Interpolated behind _scale_timesteps: respacing maps whole steps only.
        low, high = (self.process._scale_timesteps(step).double() for step in (below, below + 1))
        told = (low + share * (high - low)).float()
        return lambda x_t, _, **kwargs: self.model(x_t, told, **kwargs)

    def _nearest(self, sigma: Tensor) -> Tensor:
        """The step, int64 [...], whose level is nearest to sigma [...] in log."""
        edges = self._grid(sigma.device)[2]
        return torch.bucketize(sigma.double().log(), edges)

    def _grid(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """sigma [T], log sigma [T] and the limits [T - 1] between neighbours in log sigma, float64;
        moved to a device once.
        """
        if device not in self._on_device:
            logs = self._sigmas.log()
            self._on_device[device] = (
                self._sigmas.to(device),
                logs.to(device),
                ((logs[1:] + logs[:-1]) / 2).to(device),
            )
        return self._on_device[device]
