"""Epsilon scaling in diffusers' samplers (Ning et al. 2024, arXiv 2308.15321): any pipeline, no
retraining.

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
    pipe.scheduler = EpsilonScaled(DDIMScheduler.from_config(pipe.scheduler.config), b=1.005)
    pipe.scheduler = EpsilonScaled(pipe.scheduler, *read_schedule("eps_schedule.yaml", 20))

(read_schedule of settings.lambda_file.)

epsilon -> epsilon / lambda(t), lambda(t) = k t + b, where t counts sampling steps from the clean
end: 0 is the last one. A pipeline calls `step` with the output after classifier-free guidance, so
that lambda divides the combined epsilon, once.

Two variants were published. *Both terms* (default): epsilon / lambda is what the whole step sees;
for DDIM that is x_0_hat and the direction to x_t. ADM-ES (where DDIM reads epsilon back from
x_0_hat) and EDM-ES (the derivative) are of this kind. *x_0 only* (x0_only=True, DDIM): x_0_hat is
made of epsilon / lambda, the direction keeps the network's epsilon, as in LDM-ES's code. A lambda
belongs to the variant that it was found with. One step of DDIM, with a = alpha_bar_t,
p = alpha_bar_{t-1}, e = epsilon:

    x_0_hat = (x - sqrt(1 - a) e / lambda) / sqrt(a)
    x' = sqrt(p) x_0_hat + sqrt(1 - p - s^2) e / lambda + s z    both terms
    x' = sqrt(p) x_0_hat + sqrt(1 - p - s^2) e          + s z    x0_only

The result is an instance of a subclass of the scheduler's class, made when first asked for
(EpsilonScaledDDIMScheduler, ...): all isinstance checks hold, `step` has the signature that
pipelines look at, and lambda is part of `config` (eps_scaler, eps_scaler_k, eps_x0_only). So
save_pretrained and from_pretrained of scheduler and pipeline keep lambda; diffusers wants this
module to be imported before it loads such a pipeline.
`DDIMScheduler.from_config(pipe.scheduler.config)` drops lambda. Some pipelines do just that when
they are built (DDIMPipeline): set their `scheduler` afterwards.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.epsilon_scaling import EpsilonScaling as Lambda
from ..diffusion.epsilon_scaling import divide
from .diffusers_models import import_diffusers

SUPPORTED = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler")
_PREFIX = "EpsilonScaled"
# Of the config, besides the scheduler's own; the names of our flags.
_OWN = {"eps_scaler": 1.0, "eps_scaler_k": 0.0, "eps_x0_only": False}


def EpsilonScaled(
    scheduler: Any,
    b: float | Sequence[float] = 1.0,
    k: float = 0.0,
    schedule: Sequence[float] | None = None,
    x0_only: bool = False,
) -> EpsilonScaling:
    """A copy of a diffusers scheduler that divides epsilon by lambda(t) = k t + b; for lambda = 1
    bitwise the same.

    Args:
        scheduler: DDIMScheduler, DDPMScheduler or EulerDiscreteScheduler; it is not changed.
        b: a number, or one value per sampling step, index 0 = last, clean step.
        k: slope per sampling step.
        schedule: the values, instead of b and k.
        x0_only: LDM-ES's variant, see above; DDIM only.

    Raises:
        ValueError: another scheduler, one that is scaled already, two lambdas, or a lambda that is
            not positive. Later, from set_timesteps: a number of steps other than that of the
            values.
    """
    name = type(scheduler).__name__
    if isinstance(scheduler, EpsilonScaling):
        raise ValueError(
            f"this scheduler divides epsilon already (lambda = {scheduler.config.eps_scaler}): "
            f"wrap the one below it, {name.removeprefix(_PREFIX)}.from_config(scheduler.config)"
        )
    library = import_diffusers()
    if type(scheduler) not in [getattr(library, supported) for supported in SUPPORTED]:
        raise ValueError(
            f"epsilon scaling knows {', '.join(SUPPORTED)}, got {name}: others keep outputs of "
            "earlier steps (multistep: PNDM, DPM-Solver, UniPC, Heun) or have their own form of a "
            "step; convert with DDIMScheduler.from_config(scheduler.config)"
        )
    if schedule is not None:
        if b != 1.0 or k != 0.0:
            raise ValueError(
                f"schedule says what lambda(t) is, but b={b}, k={k} say something else: give one "
                "of them"
            )
        b = schedule
    values: Any = b
    several = isinstance(values, Sequence) or hasattr(values, "tolist")
    b = [float(value) for value in values] if several else float(values)
    scaled: Any = object.__new__(_scaled_class(type(scheduler).__name__))
    scaled.__dict__.update(scheduler.__dict__)
    scaled.register_to_config(eps_scaler=b, eps_scaler_k=float(k), eps_x0_only=bool(x0_only))
    scaled._prepare_scaling()
    return scaled


class EpsilonScaling:
    """What the scaled schedulers have before their own class in the order of inheritance."""

    # Of the scheduler that comes after it, which is diffusers'.
    config: Any
    timesteps: Tensor
    sigmas: Tensor
    step_index: Any
    num_inference_steps: int
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    _init_step_index: Callable[[Any], None]
    _get_variance: Callable[[int, int], Any]

    def _prepare_scaling(self) -> None:
        config = self.config
        if config.eps_x0_only and not isinstance(self, import_diffusers().DDIMScheduler):
            raise ValueError(
                "x0_only is a variant of DDIM's step, got "
                f"{type(self).__name__.removeprefix(_PREFIX)}: leave it out"
            )
        steps = len(config.eps_scaler) if isinstance(config.eps_scaler, (list, tuple)) else 1
        Lambda.of(config.eps_scaler, config.eps_scaler_k).lambdas(
            steps
        )  # tells of a wrong lambda before anything is sampled
        self._lambdas: list[float] = []

    def _settle_lambdas(self) -> None:
        """One lambda for each of the timesteps, noisiest first, like them."""
        values = Lambda.of(self.config.eps_scaler, self.config.eps_scaler_k).lambdas(
            len(self.timesteps)
        )
        self._lambdas = values[::-1].tolist()

    def lambda_at(self, timestep: Any) -> float:
        """lambda of the step that starts at `timestep`, one of self.timesteps."""
        if len(self._lambdas) != len(self.timesteps):  # DDPM may be used without set_timesteps
            self._settle_lambdas()
        if hasattr(self, "sigmas"):  # Euler counts its steps
            if self.step_index is None:
                self._init_step_index(timestep)
            return self._lambdas[self.step_index]
        found = (self.timesteps == int(timestep)).nonzero()
        if len(found) == 0:
            raise ValueError(
                f"timestep {int(timestep)} is none of the {len(self.timesteps)} of this sampling "
                "run: take them from scheduler.timesteps"
            )
        return self._lambdas[int(found[0])]

    def _scaled_step(
        self,
        step: Any,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`step` of the scheduler below, with epsilon divided; what it returns."""
        lam = self.lambda_at(timestep)
        if lam == 1.0:
            return step(self, model_output, timestep, sample, *args, **kwargs)
        options = inspect.signature(step).bind(
            self, model_output, timestep, sample, *args, **kwargs
        )
        options.apply_defaults()
        self._check_options(options.arguments)
        # A learned variance follows the prediction, and stays as it is.
        prediction, variance = (
            model_output[:, : sample.shape[1]],
            model_output[:, sample.shape[1] :],
        )
        view = self._view(prediction, timestep, sample)
        self._check_noise(view)
        epsilon = view.epsilon()
        scaled = view.output(divide(epsilon, lam)).to(model_output.dtype)
        result = step(self, torch.cat([scaled, variance], dim=1), timestep, sample, *args, **kwargs)
        if not self.config.eps_x0_only:
            return result
        correction = self._direction(timestep, options.arguments["eta"]) * (epsilon - epsilon / lam)
        if isinstance(result, tuple):
            return (result[0] + correction.to(result[0].dtype), *result[1:])
        result.prev_sample = result.prev_sample + correction.to(result.prev_sample.dtype)
        return result

    def _check_options(self, options: dict[str, Any]) -> None:
        """What a step cannot be asked for together with lambda."""
        if self.config.eps_x0_only and options.get("use_clipped_model_output"):
            raise ValueError(
                "x0_only keeps the network's epsilon in the direction term, "
                "use_clipped_model_output replaces it: use one of them"
            )
        if options.get("s_churn") and self.config.prediction_type != "epsilon":
            raise ValueError(
                "Euler with s_churn adds noise inside of the step, so that epsilon cannot be told "
                f"from an output of type {self.config.prediction_type!r}: use s_churn=0"
            )

    def _check_noise(self, view: _View) -> None:
        """Where x_0_hat = (x - sigma epsilon) / alpha multiplies any change of epsilon by
        thousands, or is not defined.
        """
        clips = getattr(self.config, "clip_sample", False) or getattr(
            self.config, "thresholding", False
        )
        if view.alpha < 1e-6:
            raise ValueError(
                "the first step starts from pure noise (alpha_bar = 0, rescale_betas_zero_snr), "
                "where epsilon says nothing about x_0: give lambda as a schedule with 1 there "
                "(its last value)"
            )
        if view.sigma > 1000 * view.alpha and not clips:
            warnings.warn(
                "epsilon scaling of a step from almost pure noise multiplies any change of "
                f"epsilon by {view.sigma / view.alpha:.0f}, and nothing clips x_0 there: lambda "
                "!= 1 will ruin the samples; use a schedule with 1 there (its last value)",
                stacklevel=4,
            )

    def _view(self, prediction: Tensor, timestep: Any, sample: Tensor) -> _View:
        """The output and the sample at a scale at which sample = alpha x_0 + sigma epsilon, alpha^2
        + sigma^2 = 1.
        """
        kind = self.config.prediction_type
        if hasattr(self, "sigmas"):
            sigma = float(self.sigmas[self.step_index])
            alpha = 1 / math.sqrt(1 + sigma**2)
            return _View(kind, prediction, sample * alpha, alpha, alpha * sigma)
        alpha_bar = float(self.alphas_cumprod[int(timestep)])
        return _View(kind, prediction, sample, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    def _direction(self, timestep: Any, eta: float) -> float:
        """What DDIM's step multiplies epsilon by, apart from x_0_hat:
        sqrt(1 - alpha_bar_{t-1} - s^2).
        """
        before = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        alpha_bar = float(self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod)
        variance = eta**2 * float(self._get_variance(int(timestep), before))
        return math.sqrt(max(0.0, 1 - alpha_bar - variance))


@dataclass(frozen=True)
class _View:
    """A network's output at x = alpha x_0 + sigma epsilon; `kind` as diffusers' prediction_type."""

    kind: str
    prediction: Tensor
    x: Tensor
    alpha: float
    sigma: float

    def epsilon(self) -> Tensor:
        """The epsilon that the output implies."""
        if self.kind == "epsilon":
            return self.prediction
        prediction, x = self.prediction.float(), self.x.float()
        if self.kind == "v_prediction":
            return self.alpha * prediction + self.sigma * x
        return (x - self.alpha * prediction) / self.sigma

    def output(self, epsilon: Tensor) -> Tensor:
        """The output that implies this epsilon."""
        if self.kind == "epsilon":
            return epsilon
        x = self.x.float()
        return (
            epsilon - self.sigma * x if self.kind == "v_prediction" else x - self.sigma * epsilon
        ) / self.alpha


@functools.cache
def _scaled_class(name: str) -> type:
    """EpsilonScaledNAME, a subclass of diffusers' NAME."""
    base = getattr(import_diffusers(), name)

    def __init__(self: Any, *args: Any, **config: Any) -> None:
        own = {key: config.pop(key, default) for key, default in _OWN.items()}
        base.__init__(self, *args, **config)
        self.register_to_config(**own)
        self._prepare_scaling()

    # from_config passes what the signature names.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(base.__init__).parameters.values(),
            *(
                inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default)
                for key, default in _OWN.items()
            ),
        ]
    )

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        self._settle_lambdas()

    @functools.wraps(base.step)
    def step(
        self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return self._scaled_step(base.step, model_output, timestep, sample, *args, **kwargs)

    return type(
        _PREFIX + name,
        (EpsilonScaling, base),
        {
            "__init__": __init__,
            "set_timesteps": set_timesteps,
            "step": step,
            "__module__": __name__,
            "__doc__": f"{name}, with epsilon divided by lambda(t); made by EpsilonScaled.",
        },
    )


def __getattr__(name: str) -> type:
    """What from_pretrained and pickle look for here: EpsilonScaledDDIMScheduler and so on;
    pipelines also their base class.
    """
    if name == "SchedulerMixin":
        return import_diffusers().SchedulerMixin
    if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) in SUPPORTED:
        return _scaled_class(name.removeprefix(_PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
