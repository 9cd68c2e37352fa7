"""The losses of cross-resolution distillation, pure functions of tensors: patch.py for Eqs. 1-2, slide.py for 3-6."""

from lrmil.distill.patch import (
    PatchLoss,
    Stage1LossSettings,
    attention_feature_loss,
    linear_fit,
    map_layers,
    patch_distillation_loss,
    pool_token_blocks,
    resolve_layers,
)
from lrmil.distill.slide import (
    RegionScores,
    Stage2LossSettings,
    StudentLoss,
    bag_distillation_loss,
    hard_attention_loss,
    region_scores,
    soft_attention_loss,
    student_loss,
)

__all__ = [
    "PatchLoss",
    "RegionScores",
    "Stage1LossSettings",
    "Stage2LossSettings",
    "StudentLoss",
    "attention_feature_loss",
    "bag_distillation_loss",
    "hard_attention_loss",
    "linear_fit",
    "map_layers",
    "patch_distillation_loss",
    "pool_token_blocks",
    "region_scores",
    "resolve_layers",
    "soft_attention_loss",
    "student_loss",
]
