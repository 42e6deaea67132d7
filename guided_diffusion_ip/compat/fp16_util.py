"""guided_diffusion.fp16_util: half-precision networks with float32 master weights, for training
loops of one's own.

Our own loop has autocast instead (training/precision.py); this is for scripts that step by
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import logger
from ..networks.layers import CONVOLUTIONS


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741 (published name)
    """A convolution's weights to float16; other modules stay. For nn.Module.apply."""
    if isinstance(l, tuple(CONVOLUTIONS.values())):
        l.half()


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741 (published name)
    """A convolution's weights to float32. For nn.Module.apply."""
    if isinstance(l, tuple(CONVOLUTIONS.values())):
        l.float()


class MixedPrecisionTrainer:
    """zero_grad, backward and optimize for one network, in float32 or with half-precision weights.

    With use_fp16 the network is converted (by its convert_to_fp16), and each of its parameters has
    a float32 master copy, which the optimizer must be given: Optimizer(trainer.master_params).
    Otherwise these are the parameters themselves.

    Args:
        fp16_scale_growth: what each step without overflow adds to lg_loss_scale.
        initial_lg_loss_scale: log2 of the factor on the loss at the start; an overflow subtracts 1.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = 20.0,
    ) -> None:
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        if use_fp16:
            # Copied before the conversion cuts off digits.
            self.master_params = [
                nn.Parameter(p.detach().float().clone(), p.requires_grad) for p in self.model_params
            ]
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

        Logs grad_norm, and lg_loss_scale if there is one. Waits for the device once.
        """
        if self.use_fp16:
            self._grads_to_masters()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.master_params if p.grad is not None]
        )
        finite = bool(torch.isfinite(norm))
        if finite:
            opt.step()
            logger.logkv_mean("grad_norm", norm)
        else:
            logger.log(
                f"a gradient is not finite: no update{self._lower_scale() if self.use_fp16 else ''}"
            )
        if self.use_fp16:
            self._masters_to_model()
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
            self.lg_loss_scale += self.fp16_scale_growth if finite else 0
        return finite

    def master_params_to_state_dict(self, master_params: Sequence[Tensor]) -> dict[str, Tensor]:
        """The network's state_dict with these values, one per parameter, float32 where the network
        is half.
        """
        names = {
            id(p): value.detach() for p, value in zip(self.model_params, master_params, strict=True)
        }
        # By identity: a shared parameter has several names, and buffers have no master.
        return {
            name: names.get(id(p), p.detach())
            for name, p in self.model.state_dict(keep_vars=True).items()
        }

    def state_dict_to_master_params(self, state_dict: Mapping[str, Tensor]) -> list[Tensor]:
        """The values of a state_dict in the order of master_params, float32 if these are copies."""
        values = [state_dict[name].detach() for name, _ in self.model.named_parameters()]
        return [value.float() for value in values] if self.use_fp16 else values

    def _grads_to_masters(self) -> None:
        for p, master in zip(self.model_params, self.master_params):
            master.grad = None if p.grad is None else p.grad.float() * 2.0**-self.lg_loss_scale

    @torch.no_grad()
    def _masters_to_model(self) -> None:
        for p, master in zip(self.model_params, self.master_params):
            p.copy_(master)
            master.grad = None  # as large as the network; not needed until the next step

    def _lower_scale(self) -> str:
        self.lg_loss_scale -= 1
        return f", loss scale lowered to 2**{self.lg_loss_scale:.4g}"
