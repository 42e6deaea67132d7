"""diffusers' networks in our process, and DDPM's U-Net built from them.

    model = DiffusersModel(UNet2DModel.from_pretrained("google/ddpm-cifar10-32"))
    losses = diffusion.training_losses(model, images, t)               # with gamma
    samples = diffusion.ddim_sample_loop(model, (16, 3, 32, 32))       # with lambda(t)

diffusers is imported only when a network is built or wrapped: pip install -e '.[diffusers]'.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..networks.layers import NUM_GROUPS
from ..networks.trunk import require_divisible
from ..networks.unet import attention_downsample_rates, default_channel_mult, parse_channel_mult
from ..sizes import parse_size


@functools.cache
def import_diffusers() -> ModuleType:
    """The library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import diffusers
        from diffusers.utils import import_utils
    except ImportError as error:
        raise ValueError(
            f"the library diffusers cannot be imported ({error}): pip install -e '.[diffusers]'"
        ) from None
    # It imports torchvision, if that is installed, with all of its networks; these need nothing of
    # it. But the compiled part of torchvision does not load beside a torch from another index, and
    # a missing one is less harm than one that fails.
    if import_utils.is_torchvision_available():
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError, OSError):
            import_utils._torchvision_available = False
    return diffusers


class DiffusersModel(nn.Module):
    """A network of diffusers as model(x, t, y=None, encoder_hidden_states=None, **cond) ->
    [N, C or 2C, H, W].

    The children of the wrapped network are this module's own children, under the same names: its
    state_dict is diffusers', and fits `unet.load_state_dict`. The wrapped network, `unet`, shares
    all weights and stays usable by itself, for save_pretrained or in a pipeline. Works for
    UNet2DModel, UNet2DConditionModel and DiTTransformer2DModel.

    Raises:
        ValueError: a network that is none of these, or has weights that are in none of its
            children.
    """

    unet: Any

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        library = import_diffusers()
        kinds = (library.UNet2DModel, library.UNet2DConditionModel, library.DiTTransformer2DModel)
        if not isinstance(unet, kinds):
            raise ValueError(
                f"got a {type(unet).__name__}: DiffusersModel takes a "
                f"{', '.join(k.__name__ for k in kinds)}"
            )
        # Not through nn.Module: registered, it would put "unet." before every name.
        object.__setattr__(self, "unet", unet)
        for name, child in unet.named_children():
            self.add_module(name, child)
        if self.state_dict().keys() != unet.state_dict().keys():
            raise ValueError(
                f"this {type(unet).__name__} holds weights outside of its children: DiffusersModel "
                "cannot keep their names"
            )
        config = unet.config
        self.in_channels: int = config.in_channels
        self.image_size = config.sample_size
        self.num_classes: int | None = _number_of_labels(unet)
        self.wants_text = isinstance(unet, library.UNet2DConditionModel)
        self.use_checkpoint = False

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes."""
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> DiffusersModel:
        self.unet.training = mode  # its children are ours
        return super().train(mode)

    def convert_to_fp16(self) -> None:
        """All weights to float16."""
        self.half()

    def convert_to_bf16(self) -> None:
        """All weights to bfloat16, for calling only."""
        self.bfloat16()

    def convert_to_fp32(self) -> None:
        """Undo convert_to_fp16 or _bf16 (the digits that it cut off do not return)."""
        self.float()

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **cond: Any,
    ) -> Tensor:
        """Predict [N, C or 2C, H, W], in x's dtype, from x [N, C, H, W].

        Args:
            timesteps: [N] or [1], whole or fractional, as the diffusion process scales them.
            y: labels, int64 [N]; for networks with class embeddings only.
            encoder_hidden_states: [N, tokens, D], for UNet2DConditionModel only.
            cond: further arguments of the wrapped network's forward.

        Raises:
            ValueError: wrong shapes; labels or hidden states missing, not asked for, or (labels on
                a CPU) out of range.
        """
        n = len(x)
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"got an input of shape {tuple(x.shape)}, but this network takes [N, "
                f"{self.in_channels}, H, W]: convert the images, or encode them to latents first"
            )
        if timesteps.shape not in ((n,), (1,), ()):
            raise ValueError(
                f"timesteps have shape {tuple(timesteps.shape)} for a batch of {n}: give one per "
                "image"
            )
        self._check_labels(y, n)
        if self.wants_text != (encoder_hidden_states is not None):
            raise ValueError(
                "this network looks at text: pass encoder_hidden_states [N, tokens, D]"
                if self.wants_text
                else "got encoder_hidden_states, but this network looks at no text: leave them out"
            )
        if encoder_hidden_states is not None:
            cond["encoder_hidden_states"] = encoder_hidden_states.to(self.dtype)
        if y is not None:
            cond["class_labels"] = y
        output = self.unet(x.to(self.dtype), timesteps.expand(n), return_dict=False, **cond)[0]
        return output.to(x.dtype)

    def _check_labels(self, y: Tensor | None, batch: int) -> None:
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                "got labels y, but this network is unconditional: leave y out"
                if y is not None
                else f"got no labels, but this network is class-conditional: pass y, [{batch}]"
            )
        # As in networks/trunk.py: reading labels on an accelerator would make the host wait for it.
        if y is None or self.num_classes is None or not batch:
            return
        if not y.is_floating_point() and y.device.type == "cpu":
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels range from {low} to {high}: this network knows 0 to "
                    f"{self.num_classes - 1}"
                )


def _number_of_labels(unet: nn.Module) -> int | None:
    """The rows of the label embedding; None: the network takes no labels."""
    known: Any = unet.config
    if getattr(known, "num_embeds_ada_norm", None):
        return known.num_embeds_ada_norm + 1  # DiT: one more for "no class"
    embedding = getattr(unet, "class_embedding", None)
    if embedding is None:
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 2**63


def ddpm_unet(
    image_size: int | Sequence[int],
    in_channels: int = 3,
    num_channels: int = 128,
    channel_mult: str | Sequence[float] = "",
    num_res_blocks: int = 2,
    attention_resolutions: str | Sequence[int] = "16",
    dropout: float = 0.0,
    class_cond: bool = False,
    num_classes: int = 1000,
    learn_sigma: bool = False,
    null_class: bool = False,
    use_checkpoint: bool = False,
) -> DiffusersModel:
    """The U-Net of Ho et al. 2020 (Appendix B), which DDIM's official code trains too: UNet2DModel
    behind DiffusersModel.

    Arguments are those flags of ADM's U-Net that it has a use for. One attention head; labels (not
    in the paper) are added to the time embedding. For CIFAR-10: 32, 3, 128, "1,2,2,2", 2, "16",
    0.1.

    Raises:
        ValueError: diffusers is missing, channel_mult does not start with 1, widths are not
            multiples of 32, or the size cannot be halved often enough.
    """
    library = import_diffusers()
    sides = parse_size(image_size)
    mult = parse_channel_mult(channel_mult) if channel_mult else default_channel_mult(sides)
    require_divisible(sides, len(mult))
    widths = [int(m * num_channels) for m in mult]
    if mult[0] != 1 or any(w % NUM_GROUPS for w in widths):
        raise ValueError(
            f"DDPM's U-Net cannot have num_channels {num_channels} with channel_mult "
            f"{','.join(map(str, mult))}: channel_mult must start with 1, and every product must "
            f"be a multiple of {NUM_GROUPS}"
        )
    attends = [
        2**level in attention_downsample_rates(sides, attention_resolutions)
        for level in range(len(mult))
    ]
    unet = library.UNet2DModel(
        sample_size=sides[0] if sides[0] == sides[1] else sides,
        in_channels=in_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        block_out_channels=tuple(widths),
        layers_per_block=num_res_blocks,
        dropout=dropout,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        num_class_embeds=num_classes + null_class if class_cond else None,
        **PAPER,
    )
    model = DiffusersModel(unet)
    if use_checkpoint:
        unet.enable_gradient_checkpointing()
        model.use_checkpoint = True
    return model


# What DDPM's U-Net has, where UNet2DModel's defaults differ, or might one day: sines before
# cosines, frequencies that end at exactly 1 / 10000; one head; rows and columns of zeros at the
# lower and right edges only when it halves.
PAPER = {
    "time_embedding_type": "positional",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "center_input_sample": False,
    "attention_head_dim": None,
    "norm_num_groups": NUM_GROUPS,
    "norm_eps": 1e-6,
    "act_fn": "silu",
    "downsample_padding": 0,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "resnet_time_scale_shift": "default",
    "mid_block_scale_factor": 1,
    "add_attention": True,
}
