"""Start a small ViT from a large one, in closed form: rotate, slice, and refit every linear map by ridge regression.

The residual stream of the teacher (width W) is projected onto its w - 1 leading directions and laid out in w
coordinates that sum to zero, so that the LayerNorm of the student sees what that of the teacher saw. Of each block the
heads and hidden units that contribute most are kept; queries and keys of a head are cut to the student's head size by
balanced truncation (the best low-rank approximation of the attention logits), values by the singular directions of what
they write. Then, block after block and on the student's own activations, the four linear maps are fitted to reproduce
the teacher's projected stream, so that later blocks correct the errors of earlier ones. The ideas are those of SliceGPT
(Ashkboos et al., ICLR 2024) and of weight selection (Xu et al., ICLR 2024); it takes a minute on a CPU and saves most
of the training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

STREAM_SCALE = 3.0
"""The student's stream is this much larger than the teacher's: LayerNorm undoes it, and AdamW steps suit it better."""


def ridge(x: Tensor, y: Tensor, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Return weight (b, a) and bias (b,) of the ridge regression of y (n, b) on x (n, a)."""
    x, y = x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    gram.diagonal().add_(strength * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight.float(), (mean_y - weight @ mean_x).float()


def _assign(layer: torch.nn.Linear, x: Tensor, y: Tensor) -> None:
    weight, bias = ridge(x, y)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def _patches(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Embedded patches (n, t, W), before positions."""
    patches = vit.patch_embed(images)
    return patches.flatten(1, 2) if patches.ndim == 4 else patches


def _embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """What enters the first block, (n, 1 + t, W)."""
    return vit._pos_embed(vit.patch_embed(images))


def _root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a covariance and its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(values.max() * 1e-6)
    return vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T


def _leading_directions(teacher: VisionTransformer, images: Tensor, width: int) -> Tensor:
    """(W, width) map of the teacher's stream into the student's; its columns sum to zero over the width."""
    total = 0.0
    stream = _embed(teacher, images)
    for block in teacher.blocks:
        stream = block(stream)
        unit = F.layer_norm(stream, stream.shape[-1:]).reshape(-1, stream.shape[-1])
        total = total + unit.T @ unit / len(unit)
    vectors = torch.linalg.eigh(total)[1].flip(1)[:, : width - 1]
    ones = torch.full((width, 1), width**-0.5)
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(width)[:, : width - 1]], 1))[0][:, 1:]
    centre = torch.eye(len(vectors)) - 1 / len(vectors)
    return STREAM_SCALE * centre @ vectors @ basis.T


def _cut_heads(qkv: Tensor, mixed: Tensor, write: Tensor, heads: int, head_dim: int) -> Tensor:
    """Queries, keys and values (n, t, 3 * heads * head_dim) of the heads that write most, cut to head_dim.

    qkv (3, n, H, t, d) and mixed (n, H, t, d), values after attention, are the teacher's; write (W, H * d) is what
    follows, in stream coordinates.
    """
    _, n, total, t, d = qkv.shape
    write = write.reshape(write.shape[0], total, d)
    flat = mixed.permute(1, 0, 2, 3).reshape(total, -1, d)
    centred = flat - flat.mean(1, keepdim=True)
    energy = torch.stack([(centred[h] @ write[:, h].T).square().sum() for h in range(total)])
    kept = energy.topk(heads).indices.sort().values
    queries, keys, values = [], [], []
    for h in kept.tolist():
        q, k, v = (part[:, h].reshape(-1, d) for part in qkv)
        # Balanced truncation of q k^T; the key's mean shifts all logits of a query alike and is left out.
        root_q, inverse_q = _root(q.T @ q / len(q))
        k_centred = k - k.mean(0)
        root_k, inverse_k = _root(k_centred.T @ k_centred / len(k))
        u, s, vt = torch.linalg.svd(root_q @ root_k)
        # Logits are divided by sqrt(head_dim) in the student and by sqrt(d) in the teacher.
        scale = s[:head_dim].sqrt() * (head_dim / d) ** 0.25
        queries.append(q @ inverse_q @ u[:, :head_dim] * scale)
        keys.append(k_centred @ inverse_k @ vt[:head_dim].T * scale)
        root_v, inverse_v = _root(centred[h].T @ centred[h] / len(centred[h]))
        u = torch.linalg.svd(root_v @ write[:, h].T, full_matrices=False)[0]
        values.append(v @ inverse_v @ u[:, :head_dim])
    return torch.cat([torch.cat(part, 1) for part in (queries, keys, values)], 1).reshape(n, t, -1)


@torch.no_grad()
def slice_teacher(
    teacher: VisionTransformer, student: VisionTransformer, teacher_images: Tensor, student_images: Tensor
) -> None:
    """Fill `student` in place from `teacher`, fitted on the same tiles as each of them sees them.

    Both are plain timm vision transformers of equal depth with a class token, and their images (n, 3, ., .), already
    normalised, give equal token grids.
    """
    width = student.embed_dim
    project = _leading_directions(teacher, teacher_images[:128], width)
    patches = student.patch_embed.patch_size[0]

    stream = _embed(teacher, teacher_images)
    pixels = F.unfold(student_images, patches, stride=patches).transpose(1, 2)
    weight, bias = ridge(pixels, _patches(teacher, teacher_images) @ project, strength=1e-4)
    student.patch_embed.proj.weight.copy_(weight.reshape(student.patch_embed.proj.weight.shape))
    student.patch_embed.proj.bias.copy_(bias)
    cls_token = teacher.cls_token.expand(len(stream), -1, -1)
    position = stream - torch.cat([cls_token, _patches(teacher, teacher_images)], 1)
    student.pos_embed.copy_((position @ project).mean(0, keepdim=True))
    student.cls_token.copy_(teacher.cls_token @ project)
    x = _embed(student, student_images)

    for big, small in zip(teacher.blocks, student.blocks, strict=True):
        attention = big.attn
        qkv = attention.qkv(big.norm1(stream))
        n, t, _ = qkv.shape
        parts = qkv.reshape(n, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts)
        scale1 = getattr(big.ls1, "gamma", torch.ones(()))
        write = project.T @ (scale1[:, None] * attention.proj.weight)
        stream = stream + scale1 * attention.proj(mixed.transpose(1, 2).reshape(n, t, -1))
        heads = small.attn.num_heads
        _assign(small.attn.qkv, small.norm1(x), _cut_heads(parts, mixed, write, heads, width // heads))
        own = small.attn.qkv(small.norm1(x)).reshape(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4)
        own = F.scaled_dot_product_attention(*own).transpose(1, 2).reshape(n, t, -1)
        _assign(small.attn.proj, own, stream @ project - x)
        x = x + small.attn.proj(own)

        before = big.mlp.fc1(big.norm2(stream))
        hidden = F.gelu(before)
        scale2 = getattr(big.ls2, "gamma", torch.ones(()))
        write = project.T @ (scale2[:, None] * big.mlp.fc2.weight)
        energy = hidden.reshape(-1, hidden.shape[-1]).var(0) * write.square().sum(0)
        kept = energy.topk(small.mlp.fc1.out_features).indices
        stream = stream + scale2 * big.mlp.fc2(hidden)
        _assign(small.mlp.fc1, small.norm2(x), before[..., kept])
        own = F.gelu(small.mlp.fc1(small.norm2(x)))
        _assign(small.mlp.fc2, own, stream @ project - x)
        x = x + small.mlp.fc2(own)
