"""Patch-level distillation, stage 1: what the student sees at low resolution is taught what the teacher saw inside it.

(1)  z_HR[r,k,l] = CLS token of HR child k of region r after block l of the frozen teacher
     z_LR[r,k,l] = mean of the LR *patch* tokens under child k after block l of the student
(2)  L_patch = agg_l (1/K_r) sum_k MSE(z_LR[r,k,l], z_HR[r,k,l])

Both are raw block outputs, before the final norm. MSE is the mean over channels; K_r <= K counts the children that
region r really has; the mean goes over the regions that have any; agg is the mean (or sum) over the distilled layers.
The choice of layers follows Yang et al., ViTKD: feature-based knowledge distillation for vision transformers, 2024.
As there, and first in Romero et al., FitNets, 2015, a student of another width is compared through a linear map for
each layer, which serves training alone; z_LR above is then that map's output.

Shapes. B regions, G x G tokens, ratio x ratio = K children a region, M children over all regions of the batch, width W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lrmil.encoders.shaped import matching_block
from lrmil.errors import ConfigError
from lrmil.geometry import check_token_grid
from lrmil.settings import Settings

LayerAggregation = Literal["mean", "sum"]
Projection = Callable[[Tensor], Tensor]
"""(n, width of the student) to (n, width of the teacher)"""


class Stage1LossSettings(Settings):
    """What the student encoder is taught."""

    layers: tuple[int, ...] = Field(
        (0, 1, -1),
        description="distilled blocks, counted from 0, or from the end if negative; the authors' code: 0, 1, 10",
    )
    layer_aggregation: LayerAggregation = Field("mean", description="how the losses of the layers are joined")
    layer_norm_targets: bool = Field(
        False, description="compare after a LayerNorm over channels, lest the last block outweigh the others"
    )
    lambda_attention_feature: float = Field(
        0.0,
        ge=0,
        description="weight of an extra loss of the authors' code: student embedding against the embeddings of the "
        "children, weighted by the teacher head's attention; needs a trained teacher head first",
    )


def resolve_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return block indices in 0..depth-1, ascending, each once; negative ones count from the end.

    Raises:
        ConfigError: there is no such block, or no layer is asked for.
    """
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong or not layers:
        raise ConfigError(
            f"layers {list(layers)}: {wrong or 'an empty list'} cannot be distilled, the encoder has {depth} blocks.",
            fix=f"Choose from 0 to {depth - 1}, or -1 for the last.",
        )
    return tuple(sorted({layer % depth for layer in layers}))


def map_layers(
    layers: Sequence[int], depth: int, student_depth: int, pairs: Sequence[tuple[int, int]] = ()
) -> dict[int, int]:
    """Return {block of the teacher: block of the student that is taught by it}, for each of `layers`.

    At equal depth each block teaches its like. Else the block of the same relative depth is taught, first by first and
    last by last, see `matching_block`; in a student of few blocks, one may be taught by two.

    Args:
        layers: distilled blocks of the teacher, see `resolve_layers`.
        depth: number of its blocks.
        student_depth: number of the student's.
        pairs: (teacher's block, student's block) that go together instead; negative ones count from the end.

    Raises:
        ConfigError: there is no such block, or a pair is of a block that is not distilled.
    """
    found = {layer: matching_block(layer, depth, student_depth) for layer in resolve_layers(layers, depth)}
    for own, learner in pairs:
        if not (-depth <= own < depth and own % depth in found and -student_depth <= learner < student_depth):
            raise ConfigError(
                f"layer_pairs: [{own}, {learner}] pairs no distilled block of the teacher (layers {sorted(found)}) "
                f"with one of the student's {student_depth}.",
                fix="Give [teacher's block, student's block], and name the former in stage1.loss.layers.",
            )
        found[own % depth] = learner % student_depth
    return found


def linear_fit(inputs: Tensor, targets: Tensor, *, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Fit targets (n, V) by inputs (n, W): the weight (V, W) and bias (V,) of least squares with a ridge, float32.

    The ridge is a share of the inputs' mean variance and does not shrink the bias. Computed in float64.
    """
    x, y = inputs.double(), targets.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    variance = float(gram.diagonal().mean())
    # Inputs without any variance leave nothing to fit but the mean.
    ridge = ridge * variance if variance > 0 else 1.0
    weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), x.T @ y).T
    return weight.float(), (y_mean - weight @ x_mean).float()


@dataclass(frozen=True, slots=True)
class PatchLoss:
    """L_patch and the terms that it is made of."""

    total: Tensor
    per_layer: dict[int, Tensor]


def pool_token_blocks(tokens: Tensor, ratio: int) -> Tensor:
    """Average the tokens under each child: (B, G, G, W) -> (B, ratio**2, W), slot = ratio * row + column.

    Axis 1 of `tokens` is the row (y), axis 2 the column (x).

    Raises:
        GridMismatch: G is not divisible by `ratio`.
    """
    batch, rows, columns, width = tokens.shape
    if rows != columns:
        raise ValueError(f"the token grid is {rows} x {columns}, not square")
    check_token_grid(rows, ratio)
    block = rows // ratio
    blocks = tokens.reshape(batch, ratio, block, ratio, block, width)
    return blocks.mean(dim=(2, 4)).reshape(batch, ratio * ratio, width)


def patch_distillation_loss(
    student_tokens: Mapping[int, Tensor],
    teacher_cls: Mapping[int, Tensor],
    region: Tensor,
    slot: Tensor,
    *,
    ratio: int,
    layer_aggregation: LayerAggregation = "mean",
    layer_norm_targets: bool = False,
    projections: Mapping[int, Projection] | None = None,
) -> PatchLoss:
    """Eq. (2) for children that lie on their region's own grid.

    Args:
        student_tokens: {layer: (B, G, G, W)} patch tokens of the student, without CLS, under the teacher's layers.
        teacher_cls: {layer: (M, W)} CLS tokens of the teacher; no gradient flows into them.
        region: (M,) int64, row 0..B-1 of the region that a child lies in.
        slot: (M,) int64, ratio * row + column of the child in its region.
        ratio: children along one side of a region.
        layer_aggregation: mean or sum over layers.
        layer_norm_targets: compare after a LayerNorm without weights over the channels of both sides.
        projections: {layer: map to the teacher's width}, where the student's is another.

    Returns:
        The loss in float32; 0, still attached to the graph, if the batch has no child.
    """
    matched = {
        layer: pool_token_blocks(student_tokens[layer].float(), ratio)[region, slot] for layer in _layers(teacher_cls)
    }
    if projections:
        # Linear maps and means change places: projecting the means is 16 times cheaper than projecting tokens.
        matched = {layer: projections[layer](means) for layer, means in matched.items()}
    regions = len(next(iter(student_tokens.values())))
    return _matched_loss(matched, teacher_cls, region, regions, layer_aggregation, layer_norm_targets)


def token_windows(
    offset: Tensor, token_side: float, token_grid_side: int, block: int, *, window: Literal["contained", "released"]
) -> tuple[Tensor, Tensor]:
    """Find the tokens under children that do not lie on their region's grid, since both scales were tiled on their own.

    Args:
        offset: (M, 2) child's top-left corner minus region's, (x, y), in any unit.
        token_side: side of one LR token in that unit (64 if it is 20x pixels, at 5x with 16-px tokens).
        token_grid_side: G.
        block: tokens along the side of a child.
        window: "contained" takes children that lie wholly inside the region. "released", the rule of the authors' code,
            also takes those that stick out by less than a token.

    Returns:
        (M, 2) int64 first token row and column, offsets rounded down; and (M,) bool, whether the child counts.
    """
    start = torch.floor(offset / token_side).long().flip(1)
    last = token_grid_side - block
    if window == "released":
        inside = (offset >= 0) & (start.flip(1) <= last)
    else:
        inside = (offset >= 0) & (offset <= last * token_side)
    return start, inside.all(dim=1)


def window_distillation_loss(
    student_tokens: Mapping[int, Tensor],
    teacher_cls: Mapping[int, Tensor],
    region: Tensor,
    start: Tensor,
    *,
    block: int,
    layer_aggregation: LayerAggregation = "mean",
    layer_norm_targets: bool = False,
) -> PatchLoss:
    """Eq. (2) for children anywhere in their region: child m lies over the block x block tokens from `start[m]` on.

    `start` (M, 2) is (row, column), see `token_windows`. The rest is as in `patch_distillation_loss`.
    """
    row, column = start.unbind(1)
    matched = {}
    for layer in _layers(teacher_cls):
        means = F.avg_pool2d(student_tokens[layer].float().permute(0, 3, 1, 2), block, stride=1)
        matched[layer] = means[region, :, row, column]
    regions = len(next(iter(student_tokens.values())))
    return _matched_loss(matched, teacher_cls, region, regions, layer_aggregation, layer_norm_targets)


def attention_feature_loss(
    student_embedding: Tensor, teacher_embedding: Tensor, attention: Tensor, region: Tensor
) -> Tensor:
    """Pull a region's embedding towards those of its children, weighted by how much the teacher head attends to them.

        mean_r sum_{j in r} w_j mean_c (E_HR[j] - E_LR[r])**2,    w = attention renormalised within the region

    Uniform weights where the region's attention sums to 0 or less. The term is in the authors' code, not in the paper.

    Args:
        student_embedding: (B, E).
        teacher_embedding: (M, E), no gradient.
        attention: (M,), softmaxed over the slide. (The authors' code takes logits here, whose sum may vanish.)
        region: (M,) int64, row 0..B-1.
    """
    attention = attention.detach().float()
    count = _count(region, len(student_embedding))
    own_mass = torch.zeros_like(count).index_add_(0, region, attention)[region]
    weight = torch.where(own_mass > 0, attention / own_mass, 1.0 / count[region])
    error = (teacher_embedding.detach().float() - student_embedding.float()[region]).square().mean(dim=1)
    return (error * weight).sum() / (count > 0).sum().clamp(min=1)


def _matched_loss(
    matched: Mapping[int, Tensor],
    teacher_cls: Mapping[int, Tensor],
    region: Tensor,
    regions: int,
    layer_aggregation: LayerAggregation,
    layer_norm_targets: bool,
) -> PatchLoss:
    """Compare matched rows (M, W): mean over channels, over a region's children, over regions; then join the layers."""
    # One weight a child makes the two means a single sum, whatever the order of the children.
    count = _count(region, regions)
    weight = 1.0 / (count[region] * (count > 0).sum())
    per_layer = {}
    for layer, student in matched.items():
        teacher = teacher_cls[layer].detach().float()
        if layer_norm_targets:
            student, teacher = (F.layer_norm(side, side.shape[-1:]) for side in (student, teacher))
        per_layer[layer] = ((student - teacher).square().mean(dim=1) * weight).sum()
    stacked = torch.stack(list(per_layer.values()))
    return PatchLoss(stacked.mean() if layer_aggregation == "mean" else stacked.sum(), per_layer)


def _count(region: Tensor, regions: int) -> Tensor:
    """K_r, (regions,), as float32."""
    return torch.zeros(regions, device=region.device).index_add_(
        0, region, torch.ones_like(region, dtype=torch.float32)
    )


def _layers(teacher_cls: Mapping[int, Tensor]) -> list[int]:
    if not teacher_cls:
        raise ValueError("no layers to distil")
    return sorted(teacher_cls)
