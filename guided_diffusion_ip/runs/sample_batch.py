"""A batch of samples in which image i depends on (seed, i) alone: not on batch size, processes or
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import dist_util
from ..data.image_io import to_uint8
from ..diffusion.epsilon_scaling import EpsilonScaling, warn_if_unclipped
from ..diffusion.gaussian_diffusion import GaussianDiffusion
from ..diffusion.guidance import CondFn, classifier_free
from ..diffusion.process import Network, RandnLike
from ..diffusion.solvers import SOLVERS
from ..diffusion.solvers.loop import last_of, run, warn_if_training
from ..diffusion.solvers.paths import AlongProcess, SamplingPath, Step
from ..diffusion.solvers.sigma_path import AlongSigma
from ..noise import NormalStream, Stream, integers


@dataclass(frozen=True)
class Sampler:
    """How to sample: a solver along a path. See `process_sampler` and `sigma_sampler`.

    Args:
        along: the path without its network: a process, or EDM's noise levels; with lambda(t).
        image_shape: (C, H, W).
        solver: a name in SOLVERS.
        options: of the solver's step, such as DDIM's eta.
        guidance_scale, null_label: classifier-free guidance, see diffusion/guidance.py.
        rounded: how to_uint8 makes pixels of the images: truncated, as in ADM, or rounded, as EDM
            does.

    Raises:
        ValueError: a solver that there is not, or for another kind of path; an option that it does
            not have.
    """

    along: AlongProcess | AlongSigma
    image_shape: tuple[int, int, int]
    seed: int = 0
    solver: str = "ddpm"
    options: dict[str, Any] = field(default_factory=dict)
    guidance_scale: float = 1.0
    null_label: int | None = None
    rounded: bool = False

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"there is no solver {self.solver!r}: use {', '.join(SOLVERS)}")
        solver = SOLVERS[self.solver]
        if solver.along not in (self.along.kind, "either"):
            along = {"process": "the steps of a process", "sigma": "EDM's noise levels"}
            raise ValueError(
                f"{solver.title} goes along {along[solver.along]}, not along "
                f"{along[self.along.kind]}"
            )
        if unknown := [name for name in self.options if name not in solver.options]:
            raise ValueError(f"{solver.title} has no option {unknown[0]}")

    @property
    def num_steps(self) -> int:
        return self.along.num_steps

    @property
    def network_calls(self) -> int:
        """For one batch."""
        return SOLVERS[self.solver].calls(self.num_steps)

    def with_scaling(self, scaling: EpsilonScaling) -> Sampler:
        """The same with another lambda(t)."""
        return replace(self, along=self.along.with_scaling(scaling))

    def finer(self) -> Sampler:
        """The same with a level more between any two: level t here is level 2 t there.

        Raises:
            ValueError: there is no room for them.
        """
        return replace(self, along=self.along.finer())

    def bind(
        self,
        model: Network,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> SamplingPath:
        """The path with this network, guided."""
        guided = classifier_free(model, self.guidance_scale, self.null_label)
        guide_score = SOLVERS[self.solver].guide_score
        return self.along.bind(guided, model_kwargs or {}, guide_score, device)

    def chain(
        self, path: SamplingPath, noise: Tensor, randn_like: RandnLike, progress: bool = False
    ) -> Iterator[Step]:
        """Each step from standard normal noise [N, C, H, W] on."""
        return run(SOLVERS[self.solver], path, noise, randn_like, progress, **self.options)

    def step(
        self,
        path: SamplingPath,
        x: Tensor,
        index: int,
        randn_like: RandnLike,
        previous: Step | None = None,
    ) -> Step:
        """One step from level `index`; `previous` led to x."""
        here = path.level(index, x) if previous is None else previous.level
        there = path.level(index - 1, x)
        step = SOLVERS[self.solver].step
        return step(path, x, here, there, previous, randn_like, **self.options)

    def __call__(
        self,
        model: Network,
        index: Sequence[int],
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> Tensor:
        """The images numbered `index`, float32 [N, C, H, W] in about [-1, 1]."""
        warn_if_training(model)
        if isinstance(self.along, AlongProcess) and not self.along.clip_denoised:
            if self.along.process.scales_epsilon:
                warn_if_unclipped(self.along.process)
        path = self.bind(model, model_kwargs, device)
        draw = NormalStream(self.seed, Stream.SAMPLE, torch.as_tensor(index))
        noise = draw(torch.empty(len(index), *self.image_shape, device=device))
        return path.finished(last_of(self.chain(path, noise, draw, progress)).x)


def process_sampler(
    process: GaussianDiffusion,
    image_shape: tuple[int, int, int],
    seed: int = 0,
    solver: str = "ddpm",
    *,
    eta: float | None = None,
    clip_denoised: bool = True,
    cond_fn: CondFn | None = None,
    **options: Any,
) -> Sampler:
    """A Sampler along the steps of a process, which is respaced and knows its lambda(t) already.

    Args:
        eta: DDIM's noise. cond_fn: classifier guidance; it is given the same model_kwargs as the
            network. options: the others of Sampler.
    """
    along = AlongProcess(process, clip_denoised, cond_fn=cond_fn)
    own = {} if eta is None else {"eta": eta}
    return Sampler(along, image_shape, seed, solver, own, **options)


def compiled(network: torch.nn.Module, device: torch.device) -> Network:
    """The network through torch.compile, for calling without gradients; on a GPU with CUDA graphs,
    which save launching kernels.
    """
    if device.type != "cuda":
        return torch.compile(network)
    graphed = torch.compile(network, mode="reduce-overhead")

    def call(*args: Any, **kwargs: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # A copy: the graph's next run writes where this one's answer lies.
        return graphed(*args, **kwargs).clone()

    return call


class ImagesWithNaN(ValueError):
    """Some of the images that were drawn are none."""


def draw_images(
    sampler: Sampler,
    model: Network,
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
            more = ", ..." if len(class_names) > 4 else ""
            known = f", or names of its classes ({', '.join(class_names[:4])}{more})"
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
