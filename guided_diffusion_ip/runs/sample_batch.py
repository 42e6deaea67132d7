"""A batch of samples in which image i depends on (seed, i) alone: not on batch size, processes or
device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import dist_util
from ..data.image_io import to_uint8
from ..diffusion.edm_sampling import ablation_sample, edm_sample
from ..diffusion.guidance import classifier_free
from ..noise import NormalStream, Stream, integers


@dataclass(frozen=True)
class Sampler:
    """How to sample: the process is already respaced, and knows its lambda(t).

    cond_fn and guidance_scale guide, see diffusion/guidance.py; cond_fn is given the same
    model_kwargs as the network.

    Raises:
        ValueError: guidance_scale is not 1 and there is no null_label.
    """

    diffusion: Any
    image_shape: tuple[int, int, int]  # C, H, W
    seed: int = 0
    use_ddim: bool = False
    eta: float = 0.0
    clip_denoised: bool = True
    cond_fn: Callable[..., Tensor] | None = None
    guidance_scale: float = 1.0
    null_label: int | None = None

    @property
    def rounded(self) -> bool:
        """How to_uint8 makes pixels of the images: truncated, as in ADM."""
        return False

    @property
    def network_calls(self) -> int:
        """For one batch."""
        return self.diffusion.num_timesteps

    def __call__(
        self,
        model: Callable[..., Tensor],
        index: Sequence[int],
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> Tensor:
        """The images numbered `index`, float32 [N, C, H, W] in about [-1, 1]."""
        model = classifier_free(model, self.guidance_scale, self.null_label)
        options = {
            "clip_denoised": self.clip_denoised,
            "model_kwargs": model_kwargs,
            "device": device,
            "progress": progress,
            "cond_fn": self.cond_fn,
            "randn_like": NormalStream(self.seed, Stream.SAMPLE, torch.as_tensor(index)),
        }
        shape = (len(index), *self.image_shape)
        if self.use_ddim:
            return self.diffusion.ddim_sample_loop(model, shape, eta=self.eta, **options)
        return self.diffusion.p_sample_loop(model, shape, **options)


@dataclass(frozen=True)
class SigmaSampler:
    """How to sample along noise levels sigma: EDM's Heun and Euler, of anything that can be seen as
    a denoiser D(x, sigma).

    Args:
        as_denoiser: as_denoiser(network, model_kwargs) -> D; see diffusion/denoiser.py.
        options: of edm_sample or, with `ablation`, of ablation_sample: num_steps, sigma_min,
            S_churn, eps_scaler, ...
        guidance_scale, null_label: as for Sampler.
        rounded: make pixels of the images as EDM does, see to_uint8; for EDM's models.
    """

    as_denoiser: Callable[[Callable[..., Tensor], dict[str, Any]], Any]
    image_shape: tuple[int, int, int]  # C, H, W
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    ablation: bool = False
    guidance_scale: float = 1.0
    null_label: int | None = None
    rounded: bool = False

    @property
    def network_calls(self) -> int:
        """For one batch: Heun corrects every step but the last."""
        steps = self.options.get("num_steps", 18)
        return 2 * steps - 1 if self.options.get("solver", "heun") == "heun" else steps

    def __call__(
        self,
        model: Callable[..., Tensor],
        index: Sequence[int],
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> Tensor:
        """The images numbered `index`, float32 [N, C, H, W] in about [-1, 1]."""
        kwargs = dict(model_kwargs or {})
        labels = kwargs.pop("y", None)
        denoiser = self.as_denoiser(
            classifier_free(model, self.guidance_scale, self.null_label), kwargs
        )
        draw = NormalStream(self.seed, Stream.SAMPLE, torch.as_tensor(index))
        latents = draw(torch.empty(len(index), *self.image_shape, device=device))
        with torch.no_grad():
            return (ablation_sample if self.ablation else edm_sample)(
                denoiser, latents, labels, randn_like=draw, progress=progress, **self.options
            ).float()


def compiled(network: torch.nn.Module, device: torch.device) -> Callable[..., Tensor]:
    """The network through torch.compile, for calling without gradients; on a GPU with CUDA graphs,
    which save launching kernels.
    """
    if device.type != "cuda":
        return torch.compile(network)
    graphed = torch.compile(network, mode="reduce-overhead")

    def call(*args: Any, **kwargs: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return graphed(
            *args, **kwargs
        ).clone()  # the graph's next run writes where this one's answer lies

    return call


class ImagesWithNaN(ValueError):
    """Some of the images that were drawn are none."""


def draw_images(
    sampler: Sampler | SigmaSampler,
    model: Callable[..., Tensor],
    count: int,
    batch_size: int,
    kwargs_for: Callable[[list[int]], dict[str, Tensor]],
) -> np.ndarray:
    """Images 0 .. count - 1 as uint8 [count, H, W, C], on every rank; a collective: the ranks share
    the work.

    Args:
        kwargs_for: model_kwargs of the images numbered [n].

    Raises:
        ImagesWithNaN: there are some; on every rank, whichever drew them.
    """
    rank, world, device = dist_util.get_rank(), dist_util.get_world_size(), dist_util.dev()
    mine = range(count * rank // world, count * (rank + 1) // world)
    channels, height, width = sampler.image_shape
    flat, bad = [np.empty((0, height * width * channels), np.uint8)], 0
    for start in range(0, len(mine), batch_size):
        index = list(mine[start : start + batch_size])
        kwargs = {name: value.to(device) for name, value in kwargs_for(index).items()}
        images = sampler(model, index, kwargs, device)
        broken = images.isnan().flatten(1).any(1)
        bad += int(broken.sum())
        flat.append(to_uint8(images[~broken], sampler.rounded).flatten(1).cpu().numpy())
    if bad := sum(dist_util.all_gather_objects(bad)):
        raise ImagesWithNaN(
            f"{bad} of {count} images contain NaN: the model has diverged, or overflows in half "
            "precision"
        )
    return dist_util.all_gather_rows(np.concatenate(flat)).reshape(count, height, width, channels)


def draw_labels(
    seed: int, index: Sequence[int], class_ids: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """The class of each image, int64 [N], drawn from class_ids by (seed, image number) alone."""
    choice = integers(seed, Stream.LABEL, torch.as_tensor(index), 0, len(class_ids))
    return torch.as_tensor(class_ids)[choice].to(device)


def captions(labels: Sequence[int], class_names: Sequence[str]) -> list[str]:
    """The names of the labels' classes; their numbers where there are no names."""
    return [class_names[y] if 0 <= y < len(class_names) else str(y) for y in labels]


def parse_class_ids(text: str, num_classes: int, class_names: Sequence[str] = ()) -> list[int]:
    """[0, 1, 2, 7] from "0-2,7"; all classes from "". What is no number may be the name of a class;
    label k is class_names[k].

    Raises:
        ValueError: not of this form, or not below num_classes.
    """
    ids: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        ends = part.split("-")
        if len(ends) > 2 or not all(e.strip().isdigit() for e in ends):
            if part in class_names:
                ids.append(class_names.index(part))
                continue
            known = f", or names of its classes ({', '.join(class_names[:4])}{', ...' * (len(class_names) > 4)})"
            raise ValueError(
                f"class_ids {text!r} is not understood: use numbers and ranges, such as 0-9 or 3,5"
                + (known if class_names else "")
            )
        if int(ends[0]) > int(ends[-1]):
            raise ValueError(
                f"class_ids {text!r} has a range that runs backwards: use "
                f"{ends[-1].strip()}-{ends[0].strip()}"
            )
        ids.extend(range(int(ends[0]), int(ends[-1]) + 1))
    ids = ids or list(range(num_classes))
    if max(ids) >= num_classes:
        raise ValueError(
            f"class_ids asks for class {max(ids)}, but the model knows 0 to {num_classes - 1}"
        )
    return ids
