"""The UNets of EDM (Karras et al. 2022, arXiv 2206.00364, App. F.1, Table 7): what a
preconditioning turns into a denoiser.

    SongUNet      DDPM++ (positional, standard) and NCSN++ (fourier, residual) of Song et al. 2021
                  (arXiv 2011.13456)
    DhariwalUNet  ADM of Dhariwal & Nichol 2021 (arXiv 2105.05233), as EDM trains it

A network is called as F(x, noise_labels, class_labels, augment_labels): x [N, C, H, W],
noise_labels float [N] (c_noise), class_labels float [N, label_dim] (one-hot), augment_labels float
[N, augment_dim]. Parameter names, their order and shapes are those of EDM's checkpoints. Level l
works on feature maps of r x r pixels, r = img_resolution >> l, and its modules are named after r;
images of other sizes can be given at call if they can be halved as often.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sizes import parse_size
from .edm_layers import (
    BlockStyle,
    Direction,
    FourierEmbedding,
    Resample,
    ResamplingConv2d,
    UNetBlock,
    group_norm,
    positional_waves,
)
from .layers import timestep_embedding, zero_module
from .trunk import require_divisible


class EDMUNet(nn.Module):
    """What both have in common: encoder, decoder and the checks of what is given.

    Subclasses say in which style blocks are made, embed the conditions (in the dtype of
    `map_layer0`), and turn features into an output.
    """

    map_layer0: nn.Linear

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int,
        augment_dim: int,
        model_channels: int,
        channel_mult: Sequence[float],
        num_blocks: int,
        attn_resolutions: Sequence[int],
        label_dropout: float,
        style: BlockStyle,
    ) -> None:
        super().__init__()
        require_divisible(parse_size(img_resolution), len(channel_mult))
        if not 0 <= label_dropout < 1:
            raise ValueError(
                f"label_dropout is {label_dropout}: give a probability from 0 to below 1, such as "
                "0.1"
            )
        if model_channels % 2:
            raise ValueError(
                f"model_channels is {model_channels}: noise levels need an even number, for sines "
                "and cosines"
            )
        self.img_resolution, self.in_channels, self.out_channels = (
            img_resolution,
            in_channels,
            out_channels,
        )
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        self.style, self.num_blocks, self.attn_resolutions = (
            style,
            num_blocks,
            tuple(attn_resolutions),
        )
        self.resolutions = [img_resolution >> level for level in range(len(channel_mult))]
        self.widths = [int(model_channels * mult) for mult in channel_mult]
        if self.attn_resolutions and not set(self.attn_resolutions) & set(self.resolutions):
            warnings.warn(
                f"attn_resolutions {list(self.attn_resolutions)} names no level: this network has "
                f"feature maps of {self.resolutions} pixels",
                stacklevel=3,
            )

    # ---- building ----

    def _block(
        self,
        in_channels: int,
        out_channels: int,
        resample: Direction | None = None,
        attention: bool = False,
    ) -> UNetBlock:
        return UNetBlock(in_channels, out_channels, self.style, resample, attention)

    def _build_encoder(self, stem_width: int) -> list[int]:
        """Fill self.enc; returns the channels of every encoder state."""
        self.enc = nn.ModuleDict()
        width = stem_width
        state_channels = []
        for r, out_width in zip(self.resolutions, self.widths):
            if r == self.img_resolution:
                self.enc[f"{r}x{r}_conv"] = nn.Conv2d(self.in_channels, width, 3, padding=1)
            else:
                self.enc[f"{r}x{r}_down"] = self._block(width, width, "down")
                self._extend_encoder(r, width)
            state_channels.append(width)
            for i in range(self.num_blocks):
                self.enc[f"{r}x{r}_block{i}"] = self._block(
                    width, out_width, attention=r in self.attn_resolutions
                )
                width = out_width
                state_channels.append(width)
        return state_channels

    def _build_decoder(self, state_channels: list[int], attend_always: bool) -> int:
        """Fill self.dec; returns the channels of its last feature map.

        Args:
            attend_always: attention after every block of a level that attends, not after its last
                block only.
        """
        self.dec = nn.ModuleDict()
        width, left = self.widths[-1], list(state_channels)
        for r, out_width in zip(reversed(self.resolutions), reversed(self.widths)):
            if r == self.resolutions[-1]:
                self.dec[f"{r}x{r}_in0"] = self._block(width, width, attention=True)
                self.dec[f"{r}x{r}_in1"] = self._block(width, width)
            else:
                self.dec[f"{r}x{r}_up"] = self._block(width, width, "up")
            for i in range(self.num_blocks + 1):
                attention = r in self.attn_resolutions and (attend_always or i == self.num_blocks)
                self.dec[f"{r}x{r}_block{i}"] = self._block(
                    width + left.pop(), out_width, attention=attention
                )
                width = out_width
            self._extend_decoder(r, width)
        return width

    def _extend_encoder(self, r: int, width: int) -> None:
        """Add to a lower level of the encoder what the subclass has besides blocks."""

    def _extend_decoder(self, r: int, width: int) -> None:
        """Add to a level of the decoder what the subclass has besides blocks."""

    # ---- running ----

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """F [N, out_channels, H, W].

        Raises:
            ValueError: shapes that do not fit, labels that are missing or that the network has no
                use for.
        """
        self._check(x, noise_labels, class_labels, augment_labels)
        if augment_labels is None and self.augment_dim:
            # "Nothing was done", and every parameter has a gradient.
            augment_labels = x.new_zeros(len(x), self.augment_dim)
        # Half precision would blur noise levels that differ by a few per mille.
        with torch.autocast(x.device.type, enabled=False):
            emb = self.embed(
                noise_labels.to(self.map_layer0.weight.dtype), class_labels, augment_labels
            )
        h, states = self._encode(x, emb)
        return self._decode(h, states, emb)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """The embedding [N, E] that the blocks are told."""
        raise NotImplementedError(f"{type(self).__name__} must define embed")

    def _decode(self, h: Tensor, states: list[Tensor], emb: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _decode")

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The lowest features, and all states, the first convolution's included."""
        h, side, states = x, x, []
        for r in self.resolutions:
            if r == self.img_resolution:
                h = self.enc[f"{r}x{r}_conv"](h)
            else:
                h, side = self._show_input(r, self.enc[f"{r}x{r}_down"](h, emb), side)
            states.append(h)
            for i in range(self.num_blocks):
                h = self.enc[f"{r}x{r}_block{i}"](h, emb)
                states.append(h)
        return h, states

    def _show_input(self, r: int, h: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """Features h of a lower level, and the side path on which the input gets there; nothing is
        shown here.
        """
        return h, side

    def _decode_level(self, r: int, h: Tensor, states: list[Tensor], emb: Tensor) -> Tensor:
        for name in ("in0", "in1") if r == self.resolutions[-1] else ("up",):
            h = self.dec[f"{r}x{r}_{name}"](h, emb)
        for i in range(self.num_blocks + 1):
            h = self.dec[f"{r}x{r}_block{i}"](torch.cat([h, states.pop()], dim=1), emb)
        return h

    def _drop_labels(self, class_labels: Tensor) -> Tensor:
        """In training, some rows become zeros (no class), with probability label_dropout."""
        if not (self.training and self.label_dropout):
            return class_labels
        keep = torch.rand(len(class_labels), 1, device=class_labels.device) >= self.label_dropout
        return class_labels * keep.to(class_labels.dtype)

    def _check(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"got images of shape {tuple(x.shape)}, but this network takes [N, "
                f"{self.in_channels}, H, W]: convert them, or build the network with their "
                "img_channels"
            )
        require_divisible(x.shape[2:], len(self.resolutions))
        n = len(x)
        if noise_labels.shape != (n,):
            raise ValueError(
                f"noise_labels have shape {tuple(noise_labels.shape)} for {n} images: give one per "
                f"image, ({n},)"
            )
        _check_rows("class labels", class_labels, n, "label_dim", self.label_dim)
        if class_labels is None and self.label_dim:
            raise ValueError(
                f"got no class labels, but this network was built for label_dim {self.label_dim}: "
                f"give one-hot rows [{n}, {self.label_dim}]; zeros stand for no class"
            )
        _check_rows("augment labels", augment_labels, n, "augment_dim", self.augment_dim)


def _check_rows(what: str, rows: Tensor | None, n: int, dim_name: str, dim: int) -> None:
    """Refuse conditions that are not [n, dim], or that a network of dim 0 has no use for."""
    if rows is not None and not (dim and rows.shape == (n, dim)):
        remedy = (
            f"give shape ({n}, {dim})" if dim else f"leave them out, or build it with {dim_name}"
        )
        raise ValueError(
            f"got {what} of shape {tuple(rows.shape)}, but this network was built for {dim_name} "
            f"{dim}: {remedy}"
        )


class SongUNet(EDMUNet):
    """DDPM++ or NCSN++, [N, in_channels, H, W] -> [N, out_channels, H, W].

    Args:
        img_resolution: side of the images.
        label_dim: number of classes; 0: unconditional.
        augment_dim: how many numbers tell what was done to an image; 0: none.
        channel_mult: channels of each level, in units of model_channels.
        channel_mult_emb: E, in units of model_channels.
        attn_resolutions: sides of the feature maps that attend; the lowest one always does, in the
            decoder.
        label_dropout: in training, the share of images whose class is withheld.
        embedding_type: of the noise level: positional (DDPM++) or fourier (NCSN++).
        channel_mult_noise: sinusoids of the noise level, in units of model_channels; 1 for DDPM++,
            2 for NCSN++.
        encoder_type: standard (DDPM++); residual (NCSN++) or skip: every level is also shown the
            input, downsampled, through a learned path or through a filter.
        decoder_type: standard; skip: the output is the sum of one image per level, upsampled.
        resample_filter: taps; [1, 1] for DDPM++, [1, 3, 3, 1] for NCSN++.
        use_checkpoint: recompute blocks in the backward pass to save memory.

    Raises:
        ValueError: an unknown type, an image side that cannot be halved often enough, channels that
            cannot be grouped.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
        use_checkpoint: bool = False,
    ) -> None:
        for name, value, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
        emb_channels = model_channels * channel_mult_emb
        style = BlockStyle(
            emb_channels,
            dropout,
            eps=1e-6,
            skip_scale=math.sqrt(0.5),
            adaptive_scale=False,
            channels_per_head=0,
            resample_filter=tuple(resample_filter),
            resample_proj=True,
            use_checkpoint=use_checkpoint,
        )
        super().__init__(
            img_resolution,
            in_channels,
            out_channels,
            label_dim,
            augment_dim,
            model_channels,
            channel_mult,
            num_blocks,
            attn_resolutions,
            label_dropout,
            style,
        )
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        self.noise_channels = model_channels * channel_mult_noise
        self.map_noise = (
            FourierEmbedding(self.noise_channels) if embedding_type == "fourier" else None
        )
        if label_dim:
            self.map_label = nn.Linear(label_dim, self.noise_channels)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, self.noise_channels, bias=False)
        self.map_layer0 = nn.Linear(self.noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self._side_channels = in_channels
        self._build_decoder(self._build_encoder(model_channels), attend_always=False)
        self._initialise()

    def _extend_encoder(self, r: int, width: int) -> None:
        taps = self.style.resample_filter
        if self.encoder_type == "skip":
            self.enc[f"{r}x{r}_aux_down"] = Resample("down", taps)
            self.enc[f"{r}x{r}_aux_skip"] = nn.Conv2d(self.in_channels, width, 1)
        elif self.encoder_type == "residual":
            self.enc[f"{r}x{r}_aux_residual"] = ResamplingConv2d(
                self._side_channels, width, 3, "down", taps, convolve_first=True
            )
            self._side_channels = width

    def _extend_decoder(self, r: int, width: int) -> None:
        if self.decoder_type == "standard" and r != self.img_resolution:
            return
        if self.decoder_type == "skip" and r != self.resolutions[-1]:
            self.dec[f"{r}x{r}_aux_up"] = Resample("up", self.style.resample_filter)
        self.dec[f"{r}x{r}_aux_norm"] = group_norm(width, self.style.eps)
        self.dec[f"{r}x{r}_aux_conv"] = nn.Conv2d(width, self.out_channels, 3, padding=1)

    def _initialise(self) -> None:
        """Uniform weights of Glorot & Bengio 2010, biases 0; what ends a branch, or the network,
        starts at almost nothing.
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                last = name.rpartition(".")[2]
                gain = (
                    1e-5
                    if last in ("conv1", "proj") or last.endswith("aux_conv")
                    else math.sqrt(0.2)
                    if last == "qkv"
                    else 1.0
                )
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        emb = (
            self.map_noise(noise_labels)
            if self.map_noise is not None
            else positional_waves(noise_labels, self.noise_channels)
        )
        emb = emb.to(noise_labels.dtype)
        if class_labels is not None:
            emb = emb + self.map_label(
                self._drop_labels(class_labels.to(emb.dtype)) * math.sqrt(self.label_dim)
            )
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _show_input(self, r: int, h: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder_type == "skip":
            side = self.enc[f"{r}x{r}_aux_down"](side)
            h = h + self.enc[f"{r}x{r}_aux_skip"](side)
        elif self.encoder_type == "residual":
            h = side = (h + self.enc[f"{r}x{r}_aux_residual"](side)) * self.style.skip_scale
        return h, side

    def _decode(self, h: Tensor, states: list[Tensor], emb: Tensor) -> Tensor:
        out: Tensor | None = None
        for r in reversed(self.resolutions):
            h = self._decode_level(r, h, states, emb)
            if f"{r}x{r}_aux_conv" in self.dec:
                image = self.dec[f"{r}x{r}_aux_conv"](F.silu(self.dec[f"{r}x{r}_aux_norm"](h)))
                out = image if out is None else self.dec[f"{r}x{r}_aux_up"](out) + image
        assert out is not None, "at least one level of the decoder has an output"
        return out


class DhariwalUNet(EDMUNet):
    """ADM's architecture in EDM's form, [N, in_channels, H, W] -> [N, out_channels, H, W].

    Arguments and errors are those of SongUNet. One head attends per 64 channels; below 64 channels
    there is, as published, no attention, and a warning says so.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
        use_checkpoint: bool = False,
    ) -> None:
        emb_channels = model_channels * channel_mult_emb
        style = BlockStyle(
            emb_channels,
            dropout,
            eps=1e-5,
            skip_scale=1.0,
            adaptive_scale=True,
            channels_per_head=64,
            resample_filter=(1, 1),
            resample_proj=False,
            use_checkpoint=use_checkpoint,
        )
        super().__init__(
            img_resolution,
            in_channels,
            out_channels,
            label_dim,
            augment_dim,
            model_channels,
            channel_mult,
            num_blocks,
            attn_resolutions,
            label_dropout,
            style,
        )
        self.model_channels = model_channels
        if augment_dim:
            self.map_augment = zero_module(nn.Linear(augment_dim, model_channels, bias=False))
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        if label_dim:
            self.map_label = nn.Linear(label_dim, emb_channels, bias=False)
            nn.init.normal_(self.map_label.weight)
        width = self._build_decoder(self._build_encoder(self.widths[0]), attend_always=True)
        self.out_norm = group_norm(width, style.eps)
        self.out_conv = nn.Conv2d(width, out_channels, 3, padding=1)
        self._initialise()
        attending = {*self.attn_resolutions, self.resolutions[-1]}
        for r, width in zip(self.resolutions, self.widths):
            if r in attending and not style.heads(width):
                warnings.warn(
                    f"no attention over {width} channels at {r} pixels: DhariwalUNet has one head "
                    "per 64; raise model_channels or channel_mult",
                    stacklevel=2,
                )

    def _initialise(self) -> None:
        """What ends a branch, or the network, starts at zero; for the rest PyTorch's own start,
        U(-a, a) with a = 1 / sqrt(fan-in), is the published one (Kaiming's uniform weights times
        sqrt(1/3), biases alike).
        """
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in ("conv1", "proj", "out_conv"):
                zero_module(module)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        emb = timestep_embedding(noise_labels, self.model_channels).to(noise_labels.dtype)
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if class_labels is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels.to(emb.dtype)))
        return F.silu(emb)

    def _decode(self, h: Tensor, states: list[Tensor], emb: Tensor) -> Tensor:
        for r in reversed(self.resolutions):
            h = self._decode_level(r, h, states, emb)
        return self.out_conv(F.silu(self.out_norm(h)))
