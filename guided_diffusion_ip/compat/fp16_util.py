"""guided_diffusion.fp16_util: half-precision networks with float32 master weights, for training
loops of one's own.

Our own loop has autocast instead (training/precision.py); this is for scripts that step by
themselves.

A group is (its parameters with their names, a shape); it has one master, a float32 tensor of that
shape with the values of all of them, one after the other. The trainer here has a group for each
parameter, in its own shape, instead of guided-diffusion's two (vectors, and all else).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..networks.layers import CONVOLUTIONS
from . import logger

INITIAL_LOG_LOSS_SCALE = 20.0

Named = Sequence[tuple[str, nn.Parameter]]
Group = tuple[Named, Sequence[int]]


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741 (published name)
    """A convolution's weights to float16; other modules stay. For nn.Module.apply."""
    if isinstance(l, tuple(CONVOLUTIONS.values())):
        l.half()


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741 (published name)
    """A convolution's weights to float32. For nn.Module.apply."""
    if isinstance(l, tuple(CONVOLUTIONS.values())):
        l.float()


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, nn.Parameter]]) -> list:
    """guided-diffusion's two groups: numbers and vectors, shape [-1], and all else, [1, -1]."""
    named = list(named_model_params)
    vectors = [(name, p) for name, p in named if p.ndim < 2]
    others = [(name, p) for name, p in named if p.ndim >= 2]
    return [(vectors, (-1,)), (others, (1, -1))]


def make_master_params(param_groups_and_shapes: Iterable[Group]) -> list[nn.Parameter]:
    """A master for each group."""
    return [
        nn.Parameter(
            _joined([p.detach() for _, p in group], shape),
            requires_grad=any(p.requires_grad for _, p in group),
        )
        for group, shape in param_groups_and_shapes
    ]


def model_grads_to_master_grads(
    param_groups_and_shapes: Iterable[Group], master_params: Iterable[Tensor]
) -> None:
    """The masters' gradients from the parameters'; zeros where only some of a group have one."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes):
        if all(p.grad is None for _, p in group):
            master.grad = None
        else:
            master.grad = _joined([param_grad_or_zeros(p) for _, p in group], shape)


@torch.no_grad()
def master_params_to_model_params(
    param_groups_and_shapes: Iterable[Group], master_params: Iterable[Tensor]
) -> None:
    """The parameters from their masters, rounded to their number format."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes):
        for (_, p), values in zip(group, unflatten_master_params(group, master)):
            p.copy_(values)


def unflatten_master_params(param_group: Named, master_param: Tensor) -> list[Tensor]:
    """The parts of a group's master, in the shapes of its parameters."""
    parts = master_param.reshape(-1).split([p.numel() for _, p in param_group])
    return [part.view(p.shape) for part, (_, p) in zip(parts, param_group)]


def master_params_to_state_dict(
    model: nn.Module,
    param_groups_and_shapes: Iterable[Group] | None,
    master_params: Sequence[Tensor],
    use_fp16: bool,
) -> dict[str, Tensor]:
    """The network's state_dict with the masters' values. Without use_fp16, master_params are in the
    order of its parameters, and the groups are not looked at.
    """
    if not use_fp16:
        values = {id(p): value for p, value in zip(model.parameters(), master_params, strict=True)}
    else:
        values = {
            id(p): value
            for master, (group, _) in zip(master_params, param_groups_and_shapes or ())
            for (_, p), value in zip(group, unflatten_master_params(group, master.detach()))
        }
    # By identity: a shared parameter has several names, and buffers have no master.
    return {
        name: values.get(id(p), p).detach() for name, p in model.state_dict(keep_vars=True).items()
    }


def state_dict_to_master_params(
    model: nn.Module, state_dict: Mapping[str, Tensor], use_fp16: bool
) -> list:
    """The values of a state_dict as masters: of guided-diffusion's two groups if use_fp16, else one
    for each parameter.
    """
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    if use_fp16:
        return make_master_params(get_param_groups_and_shapes(named))  # type: ignore[arg-type]
    return [value for _, value in named]


def zero_master_grads(master_params: Iterable[Tensor]) -> None:
    """Forget the masters' gradients."""
    for p in master_params:
        p.grad = None


def zero_grad(model_params: Iterable[Tensor]) -> None:
    """Set the gradients that are there to 0, and cut them off from how they came about."""
    for p in model_params:
        if p.grad is not None:
            p.grad = p.grad.detach().zero_()


def param_grad_or_zeros(param: Tensor) -> Tensor:
    """The gradient of a parameter, zeros if it has none."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


def check_overflow(value: float) -> bool:
    """Is this number infinite, or none?"""
    return not torch.isfinite(torch.as_tensor(value)).item()


def single_groups(model: nn.Module) -> list[Group]:
    """A group for each parameter, in its own shape."""
    return [([(name, p)], tuple(p.shape)) for name, p in model.named_parameters()]


def _joined(tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Their values in one new float32 tensor."""
    parts = [x.float().reshape(-1) for x in tensors] or [torch.zeros(0)]
    return torch.cat(parts).reshape(tuple(shape))


class MixedPrecisionTrainer:
    """zero_grad, backward and optimize for one network, in float32 or with half-precision weights.

    With use_fp16 the network is converted (by its convert_to_fp16), and each of its parameters has
    a float32 master copy, which the optimizer must be given: Optimizer(trainer.master_params).
    Otherwise these are the parameters themselves.

    Args:
        fp16_scale_growth: what each step without overflow adds to lg_loss_scale.
        initial_lg_loss_scale: log2 of the factor on the loss at the start; an overflow subtracts 1.

    Attributes:
        param_groups_and_shapes: a group for each parameter with use_fp16, else None.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
    ) -> None:
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        self.param_groups_and_shapes: list[Group] | None = None
        if use_fp16:
            # Copied before the conversion cuts off digits.
            self.param_groups_and_shapes = single_groups(model)
            self.master_params = make_master_params(self.param_groups_and_shapes)
            convert = getattr(model, "convert_to_fp16", None)
            if convert is not None:
                convert()

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        for p in self.model_params:
            p.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients; may be called several times per step."""
        (loss * 2.0**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """One step of an optimizer over master_params; False, and nothing changed, if a gradient is
        not finite.

        Logs grad_norm, param_norm, and lg_loss_scale if there is one. Waits for the device once.
        """
        groups = self.param_groups_and_shapes
        if groups is not None:
            self._grads_to_masters(groups)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.master_params if p.grad is not None]
        )
        finite = bool(torch.isfinite(norm))
        if finite:
            opt.step()
            logger.logkv_mean("grad_norm", norm)
            logger.logkv_mean("param_norm", torch.nn.utils.get_total_norm(self.master_params))
        else:
            logger.log(
                f"a gradient is not finite: no update{self._lower_scale() if self.use_fp16 else ''}"
            )
        if groups is not None:
            zero_master_grads(self.master_params)  # as large as the network; not needed any more
            master_params_to_model_params(groups, self.master_params)
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
            self.lg_loss_scale += self.fp16_scale_growth if finite else 0
        return finite

    def master_params_to_state_dict(self, master_params: Sequence[Tensor]) -> dict[str, Tensor]:
        """The network's state_dict with these values, one per parameter, float32 where the network
        is half.
        """
        return master_params_to_state_dict(
            self.model, self.param_groups_and_shapes, master_params, bool(self.use_fp16)
        )

    def state_dict_to_master_params(self, state_dict: Mapping[str, Tensor]) -> list[Tensor]:
        """The values of a state_dict in the order of master_params, float32 if these are copies."""
        values = [state_dict[name].detach() for name, _ in self.model.named_parameters()]
        return [value.float() for value in values] if self.use_fp16 else values

    def _grads_to_masters(self, groups: Sequence[Group]) -> None:
        model_grads_to_master_grads(groups, self.master_params)
        for master in self.master_params:
            if master.grad is not None:
                master.grad.mul_(2.0**-self.lg_loss_scale)

    def _lower_scale(self) -> str:
        self.lg_loss_scale -= 1
        return f", loss scale lowered to 2**{self.lg_loss_scale:.4g}"
