"""The attention pool that CONCH puts on its image trunk. Module names are those of the official checkpoint.

Learned queries look at all tokens of the trunk, class token included, once. The contrast pool has one query; its
output, normalised, is the 512-wide feature that CONCH is known for. Projected and scaled to length 1 it is compared
with text. Lu et al., "A visual-language foundation model for computational pathology", Nature Medicine 2024.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class AttentionPool(nn.Module):
    """`queries` learned questions, answered by one multi-head attention over the tokens."""

    def __init__(self, token_width: int, out_width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, out_width))
        # Where the widths differ, MultiheadAttention holds q_, k_ and v_proj_weight apart, as the checkpoint does.
        self.attn = nn.MultiheadAttention(out_width, heads, kdim=token_width, vdim=token_width, batch_first=True)
        self.ln_q = nn.LayerNorm(out_width)
        self.ln_k = nn.LayerNorm(token_width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, token_width) to (B, queries, out_width)."""
        keys = self.ln_k(tokens)
        queries = self.ln_q(self.query).expand(len(tokens), -1, -1)
        return self.attn(queries, keys, keys, need_weights=False)[0]


class ContrastPool(nn.Module):
    """From the normed tokens of the trunk to one vector per image."""

    def __init__(self, token_width: int, out_width: int, heads: int) -> None:
        super().__init__()
        self.attn_pool_contrast = AttentionPool(token_width, out_width, queries=1, heads=heads)
        self.ln_contrast = nn.LayerNorm(out_width)
        self.proj_contrast = nn.Parameter(out_width**-0.5 * torch.randn(out_width, out_width))

    def forward(self, tokens: torch.Tensor, *, project: bool = False) -> torch.Tensor:
        """(B, N, token_width) to (B, out_width); with `project`, in the space shared with text and of length 1."""
        pooled = self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])
        return F.normalize(pooled @ self.proj_contrast, dim=-1) if project else pooled
