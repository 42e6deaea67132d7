"""Self-attention over the pixels of a feature map.

Shapes: N images, C channels, H x W pixels, T = H * W tokens, h heads of d = C / h channels.
Projections are stored as 1x1 convolutions (the published parameter names and shapes), but applied
to tokens [N, T, C]: of a channels_last feature map these are a view, so nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import checkpoint, normalization, zero_module

_FEW_TOKENS = 1024  # beyond, T * T weights per head are not worth keeping


def split_qkv(qkv: Tensor, num_heads: int, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each [N, h, T, d], as views of qkv [N, T, 3 C].

    Args:
        new_order: channels are ordered (q | k | v, head, d); otherwise, as in older checkpoints,
            (head, q | k | v, d). Weights of one order are meaningless in the other.
    """
    n, t, _ = qkv.shape
    if new_order:
        q, k, v = qkv.view(n, t, 3, num_heads, -1).unbind(2)
    else:
        q, k, v = qkv.view(n, t, num_heads, 3, -1).unbind(3)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, heads joined: [N, h, T, d] -> [N, T, C]."""
    if (
        q.dtype is torch.bfloat16
        and q.device.type == "cpu"
        and torch.is_grad_enabled()
        and k.shape[2] <= _FEW_TOKENS
    ):
        # The fused kernel's backward pass is up to six times slower there than two products that
        # know the CPU's bf16 units.
        weights = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3, dtype=q.dtype)
        attended = weights @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(2)


def project(tokens: Tensor, conv: nn.Conv1d) -> Tensor:
    """Apply a convolution of kernel size 1 to tokens [N, T, C_in] -> [N, T, C_out]."""
    return F.linear(tokens, conv.weight.squeeze(-1), conv.bias)


def head_count(channels: int, num_heads: int, num_head_channels: int) -> int:
    """Number of heads: `num_heads`, unless `num_head_channels` (-1: not set) fixes their width.

    Raises:
        ValueError: the channels cannot be shared out evenly.
    """
    by_width = num_head_channels != -1
    name = "num_head_channels" if by_width else "num_heads"
    divisor = num_head_channels if by_width else num_heads
    if divisor < 1 or channels % divisor:
        raise ValueError(
            f"attention over {channels} channels with {name} {divisor}: {name} must divide the "
            "channels wherever there is attention; change it, the base channels or channel_mult"
        )
    return channels // num_head_channels if by_width else num_heads


class AttentionBlock(nn.Module):
    """x + proj(attention(qkv(norm(x)))), all pixels attending to all; [N, C, H, W] in and out.

    Vaswani et al. 2017, Sec. 3.2, placed in a UNet as by Ho et al. 2020, App. B. The output
    projection starts at zero, so that a new block is the identity.

    Raises:
        ValueError: channels not divisible by 32, or by the heads.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = head_count(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._residual, (x,), self.parameters(), self.use_checkpoint)

    def _residual(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, T, C]
        q, k, v = split_qkv(project(tokens, self.qkv), self.num_heads, self.use_new_attention_order)
        update = project(attend(q, k, v), self.proj_out).transpose(1, 2)  # [N, C, T]
        return x + update.view(x.shape)


class AttentionPool2d(nn.Module):
    """One vector per image by attention from the mean token: [N, C, H, W] -> [N, output_dim].

    The mean over the pixels joins them as token 0, learned positions are added, and the answer is
    that of token 0 (as in CLIP: Radford et al. 2021, Sec. 2.4), so only its query is computed.

    Args:
        spacial_dim: H = W, or (H, W). The spelling is the published one.
        num_heads_channels: channels of each head.
        output_dim: channels of the result; None for `embed_dim`.

    Raises:
        ValueError: embed_dim not divisible by num_heads_channels; at call, not the H x W built for.
    """

    def __init__(
        self,
        spacial_dim: int | Sequence[int],
        embed_dim: int,
        num_heads_channels: int,
        output_dim: int | None = None,
    ) -> None:
        super().__init__()
        sides = (spacial_dim, spacial_dim) if isinstance(spacial_dim, int) else tuple(spacial_dim)
        self.spatial = sides
        self.num_heads = head_count(embed_dim, -1, num_heads_channels)
        tokens = sides[0] * sides[1] + 1
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, tokens) * embed_dim**-0.5)
        self.qkv_proj = nn.Conv1d(embed_dim, 3 * embed_dim, 1)
        self.c_proj = nn.Conv1d(embed_dim, output_dim or embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.spatial:
            raise ValueError(
                f"attention pooling was built for feature maps of {self.spatial}, got "
                f"{tuple(x.shape[2:])}: give images of the model's image_size, or use another pool"
            )
        pixels = x.flatten(2).transpose(1, 2)  # [N, T, C]
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1)  # [N, T + 1, C]
        tokens = tokens + self.positional_embedding.t().to(tokens.dtype)
        weight, bias, width = self.qkv_proj.weight.squeeze(-1), self.qkv_proj.bias, x.shape[1]
        assert bias is not None, "qkv_proj is made with a bias"
        q = F.linear(tokens[:, :1], weight[:width], bias[:width])  # [N, 1, C]
        k, v = F.linear(tokens, weight[width:], bias[width:]).chunk(2, dim=2)
        q, k, v = (z.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        return project(attend(q, k, v), self.c_proj).squeeze(1)
