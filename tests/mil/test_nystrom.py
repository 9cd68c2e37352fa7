"""Nystrom attention, against the formula written out with all N x N weights, and in its exact limit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrmil.errors import HeadError
from lrmil.mil import nystrom
from lrmil.mil.nystrom import Keep, NystromAttention, pseudo_inverse


def _attention(
    dim: int = 8, heads: int = 2, landmarks: int = 4, keep: Keep = "tail", iterations: int = 6
) -> NystromAttention:
    torch.manual_seed(0)
    made = NystromAttention(
        dim, heads=heads, landmarks=landmarks, pinv_iterations=iterations, kernel=5, keep=keep, dropout=0.5
    )
    return made.double().eval()


def _tokens(count: int, dim: int = 8, seed: int = 0) -> Tensor:
    return 2 * torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _by_formula(a: NystromAttention, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all n' output rows, their matrix S1 Z S3 (heads, n', n'), and v (heads, n', d)."""
    count, dim = tokens.shape
    m, d = a.landmarks, dim // a.heads
    padding = math.ceil(count / m) * m - count
    x = torch.cat([torch.zeros(padding, dim, dtype=tokens.dtype), tokens])
    q, k, v = (y.view(-1, a.heads, d).transpose(0, 1) for y in (x @ a.to_qkv.weight.T).chunk(3, dim=1))
    q = q / math.sqrt(d)
    run = len(x) // m
    q_mean = torch.stack([q[:, i * run : (i + 1) * run].mean(1) for i in range(m)], 1)
    k_mean = torch.stack([k[:, i * run : (i + 1) * run].mean(1) for i in range(m)], 1)
    s1, s2, s3 = (torch.softmax(left @ right.mT, -1) for left, right in ((q, k_mean), (q_mean, k_mean), (q_mean, k)))
    z = s2.mT / (s2.sum(-1).max() * s2.sum(-2).max())
    eye = torch.eye(m, dtype=x.dtype)
    for _ in range(a.pinv_iterations):
        z = z @ (13 * eye - s2 @ z @ (15 * eye - s2 @ z @ (7 * eye - s2 @ z))) / 4
    matrix = s1 @ z @ s3
    out = matrix @ v
    reach = a.res_conv.kernel_size[0] // 2
    for head in range(a.heads):
        for shift in range(-reach, reach + 1):
            moved = torch.zeros_like(v[head])
            rows = [i for i in range(len(x)) if 0 <= i + shift < len(x)]
            moved[rows] = v[head][[i + shift for i in rows]]
            out[head] += a.res_conv.weight[head, 0, shift + reach, 0] * moved
    joined = torch.cat(list(out), dim=1)
    return joined @ a.to_out.weight.T + a.to_out.bias, matrix, v


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 21), heads=st.sampled_from([1, 2, 4]), landmarks=st.integers(1, 6), seed=st.integers(0, 99))
def test_it_is_the_formula(count: int, heads: int, landmarks: int, seed: int) -> None:
    tokens = _tokens(count, seed=seed)
    for keep in ("tail", "head"):
        a = _attention(heads=heads, landmarks=landmarks, keep=keep)  # type: ignore[arg-type]
        padded = _by_formula(a, tokens)[0]
        torch.testing.assert_close(a(tokens), padded[-count:] if keep == "tail" else padded[:count])


def test_keeping_the_head_of_a_padded_sequence_answers_other_tokens() -> None:
    tokens = _tokens(9)
    tail, head = _attention(keep="tail")(tokens), _attention(keep="head")(tokens)
    assert not torch.allclose(tail, head, atol=1e-3)
    torch.testing.assert_close(head[3:], tail[:-3])  # 9 tokens, 4 landmarks: 3 rows of padding
    torch.testing.assert_close(_attention(keep="tail")(_tokens(8)), _attention(keep="head")(_tokens(8)))


def test_with_a_landmark_for_every_token_it_is_plain_attention() -> None:
    tokens, a = _tokens(12), _attention(landmarks=12, iterations=40)
    torch.nn.init.zeros_(a.res_conv.weight)
    q, k, v = (y.view(12, 2, 4).transpose(0, 1) for y in (tokens @ a.to_qkv.weight.T).chunk(3, dim=1))
    plain = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).reshape(12, 8)
    torch.testing.assert_close(a(tokens), a.to_out(plain), rtol=1e-6, atol=1e-6)
    # and with more landmarks than tokens, plain attention that also looks at the zero rows before them
    more = _attention(landmarks=14, iterations=200)
    torch.nn.init.zeros_(more.res_conv.weight)
    q, k, v = (F.pad(y, (0, 0, 2, 0)) for y in (q, k, v))
    plain = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).reshape(14, 8)
    torch.testing.assert_close(more(tokens), more.to_out(plain)[2:], rtol=1e-4, atol=1e-5)


def test_the_pseudo_inverse_inverts_and_shares_its_start_among_heads() -> None:
    matrix = torch.softmax(
        3 * torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), -1
    )
    torch.testing.assert_close(pseudo_inverse(matrix, 40), torch.linalg.pinv(matrix))
    alone = torch.cat([pseudo_inverse(m[None], 2) for m in matrix])
    together = pseudo_inverse(matrix, 2)
    different = [not torch.allclose(a, b, rtol=1e-3) for a, b in zip(alone, together, strict=True)]
    assert any(different)  # the head with the smaller sums starts from the larger ones


@pytest.mark.parametrize("keep", ["tail", "head"])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_the_first_rows_alone_are_the_same(keep: Keep, rows: int) -> None:
    a = _attention(keep=keep)
    torch.testing.assert_close(a(_tokens(9), rows=rows), a(_tokens(9))[:rows])


@pytest.mark.parametrize("keep", ["tail", "head"])
@pytest.mark.parametrize("count", [1, 8, 9])
def test_weights_are_carried_back_as_by_the_whole_matrix(keep: Keep, count: int) -> None:
    a, tokens = _attention(keep=keep), _tokens(count)
    matrix = _by_formula(a, tokens)[1].mean(0)
    rows = matrix[-count:] if keep == "tail" else matrix[:count]
    weights = torch.rand(count, dtype=torch.float64)
    torch.testing.assert_close(a.back(tokens, weights), (weights @ rows)[-count:])


def test_gradients_are_right() -> None:
    a, tokens = _attention(), _tokens(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: a(x), (tokens,))
    a(tokens).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in a.parameters())


def test_autocast_does_not_reach_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    a, tokens = _attention(dim=32, heads=4, landmarks=16).float(), _tokens(60, 32).float()
    seen: list[torch.dtype] = []

    def watched(matrix: Tensor, iterations: int) -> Tensor:
        inverse = pseudo_inverse(matrix, iterations)
        seen.extend([matrix.dtype, inverse.dtype])
        return inverse

    monkeypatch.setattr(nystrom, "pseudo_inverse", watched)
    a.to_out.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = a(tokens)
        a.back(tokens, torch.ones(60))
    assert low.dtype == torch.bfloat16  # autocast was at work around it
    assert seen == [torch.float32] * 5


def test_it_never_makes_an_array_of_all_pairs() -> None:
    count, biggest = 3000, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else (made,):
                if isinstance(one, Tensor):
                    biggest = max(biggest, one.numel())
            return made

    a = _attention(dim=16, heads=2, landmarks=8).float()
    tokens = torch.randn(count, 16, requires_grad=True)
    with Watch():
        a(tokens).sum().backward()
        a.back(tokens.detach(), torch.ones(count))
    assert biggest <= 3 * 16 * (count + 8)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(HeadError, match="width of 10 cannot be split into 4"):
        NystromAttention(10, heads=4)
    with pytest.raises(HeadError, match="odd, not 32"):
        NystromAttention(8, heads=4, kernel=32)
