"""Nystrom attention: self-attention over n tokens through m landmarks, in memory and time that grow with n, not n^2.

For tokens x (n, dim), `heads` heads of width d = dim / heads, m landmarks:

    if n is no multiple of m, zero rows are put BEFORE the tokens until it is: n'
    q, k, v   = x W^T, without bias, split into heads;  q is scaled by d^(-1/2)
    q~, k~    = means of m runs of n'/m consecutive rows of q, k   (the zero rows count)
    S1 = softmax(q k~^T) (n', m)     S2 = softmax(q~ k~^T) (m, m)     S3 = softmax(q~ k^T) (m, n')
    out = S1 Z (S3 v) + depthwise convolution of v along the tokens, kernel 33;  Z is the pseudo-inverse of S2
    heads are joined, then a linear map, dropout, and the padding is dropped: the LAST n rows are kept

Z by iteration: Z0 = S2^T / (largest row sum * largest column sum of |S2|), the maxima over all heads together; then
Z <- Z (13 I - S2 Z (15 I - S2 Z (7 I - S2 Z))) / 4.

`keep="head"` keeps the first n rows instead, although the padding stands before the tokens: every token then gets the
answer of another one. Release 0.0.9 of the package that TransMIL pins did so, and only weights trained that way need
it.

Xiong et al.: Nystromformer, AAAI 2021.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrmil.errors import HeadError

Keep = Literal["tail", "head"]
_BLOCK = 8192  # tokens handled at once where a (heads, tokens, landmarks) array is made


class NystromAttention(nn.Module):
    """See the top of this file. Neither S1 nor S3 is ever held whole.

    Between the two linear maps everything is computed in float32 at least, also under autocast: half precision does not
    survive the iteration.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        landmarks: int = 256,
        pinv_iterations: int = 6,
        dropout: float = 0.0,
        kernel: int = 33,
        keep: Keep = "tail",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise HeadError(
                f"a width of {dim} cannot be split into {heads} attention heads.", fix="Change one of them."
            )
        if kernel % 2 == 0:
            raise HeadError(f"the kernel of the residual convolution must be odd, not {kernel}.")
        self.heads, self.landmarks, self.pinv_iterations, self.keep = heads, landmarks, pinv_iterations, keep
        self.scale = (dim // heads) ** -0.5
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.res_conv = nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, *, rows: int | None = None) -> Tensor:
        """Attend.

        Args:
            tokens: (n, dim), n at least 1.
            rows: return only so many rows from the first on; the others are then not computed.

        Returns:
            (n, dim) or (rows, dim), in the dtype of the last linear map.
        """
        count = len(tokens)
        start = self._padding(count) if self.keep == "tail" else 0
        stop = start + (count if rows is None else rows)
        q, k, v = self._project(tokens, self.to_qkv.weight)
        with torch.autocast(tokens.device.type, enabled=False):
            q_mean, k_mean = self._means(q), self._means(k)
            summary = self._pinv(q_mean, k_mean) @ self._attend(q_mean, k, v)
            out = self._attend(q[:, start:stop], k_mean, summary) + self._local(v, start, stop)
        return self.dropout(self.to_out(out.transpose(0, 1).reshape(stop - start, -1)))

    @torch.no_grad()
    def back(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Carry weights of the outputs back to the tokens: `weights` times S1 Z S3, averaged over heads.

        The residual convolution is left out, and so is what falls on the padding. Values may be negative, because those
        of Z may.

        Args:
            tokens: (n, dim), what `forward` was given.
            weights: (n,), one for each output row.

        Returns:
            (n,).
        """
        count = len(tokens)
        padding = self._padding(count)
        start = padding if self.keep == "tail" else 0
        dim = tokens.shape[1]
        q, k = self._project(tokens, self.to_qkv.weight[: 2 * dim])
        with torch.autocast(tokens.device.type, enabled=False):
            q_mean, k_mean = self._means(q), self._means(k)
            weights = weights.to(q.dtype)
            on_landmarks = q.new_zeros(self.heads, 1, self.landmarks)
            for at in range(0, count, _BLOCK):
                some = weights[at : at + _BLOCK]
                scores = self.scale * q[:, start + at : start + at + len(some)] @ k_mean.mT
                on_landmarks += some[None, None] @ torch.softmax(scores, dim=-1)
            on_landmarks = on_landmarks @ self._pinv(q_mean, k_mean)
            total = q.new_zeros(count)
            for head in range(self.heads):
                s3 = torch.softmax(self.scale * q_mean[head] @ k[head].mT, dim=-1)
                total += (on_landmarks[head] @ s3)[0, padding:]
        return total / self.heads

    def _padding(self, count: int) -> int:
        return -count % self.landmarks

    def _project(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Return (2 or 3, heads, n', d); the padding's rows are zero, since there is no bias."""
        padded = F.pad(tokens, (0, 0, self._padding(len(tokens)), 0))
        projected = F.linear(padded, weight)
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return projected.view(len(padded), -1, self.heads, tokens.shape[1] // self.heads).permute(1, 2, 0, 3)

    def _means(self, x: Tensor) -> Tensor:
        heads, count, width = x.shape
        return x.reshape(heads, self.landmarks, count // self.landmarks, width).mean(dim=2)

    def _pinv(self, q_mean: Tensor, k_mean: Tensor) -> Tensor:
        return pseudo_inverse(torch.softmax(self.scale * q_mean @ k_mean.mT, dim=-1), self.pinv_iterations)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q k^T) v, a block of scores at a time, forward and backward."""
        return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=self.scale)[0]

    def _local(self, v: Tensor, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of the residual convolution."""
        reach = self.res_conv.kernel_size[0] // 2
        first = max(0, start - reach)
        return self.res_conv(v[None, :, first : stop + reach])[0, :, start - first : stop - first]


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Approximate the Moore-Penrose inverse of each (m, m) matrix of `matrix` (heads, m, m).

    Its start is scaled by the largest row and column sums of all of them together.
    """
    size = matrix.abs()
    z = matrix.mT / (size.sum(dim=-1).max() * size.sum(dim=-2).max())
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ z
        z = 0.25 * z @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return z
