"""The losses against arrays made by the authors' program: every loss/ and out/ key of its two files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.distill import (
    attention_feature_loss,
    bag_distillation_loss,
    hard_attention_loss,
    patch_distillation_loss,
    region_scores,
    soft_attention_loss,
)
from lrmil.distill.patch import token_windows, window_distillation_loss
from lrmil.distill.slide import top_and_bottom
from lrmil.geometry import match_by_containment
from lrmil.mil import load_original

LAYERS = (0, 1, 10, 11)


class Ledger:
    """Compares and remembers, so that a test can insist on every key."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.seen: set[str] = set()

    def expect(self, key: str, actual: Any) -> None:
        self.file.expect(key, actual)
        self.seen.add(key)

    def insist_on_all(self) -> None:
        wanted = {k for k in self.file.arrays if k.startswith(("loss/", "out/"))}
        assert self.seen == wanted, f"never compared: {sorted(wanted - self.seen)}"


def _tensors(file: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in file.under(prefix).items()}


def test_stage1(golden: Callable[[str], Any]) -> None:
    ledger = Ledger(golden("lrmil_stage1_losses"))
    given = _tensors(ledger.file, "in/aligned/")
    tokens = {layer: given[f"lr_tokens_layer{layer}"] for layer in LAYERS}
    teacher = {layer: given[f"hr_cls_layer{layer}"] for layer in LAYERS}

    # The matched grid's way: children inside the footprint, by slot.
    pairs = match_by_containment(given["coords_5x"][None].numpy(), given["coords_20x"].numpy(), 1024, 256)
    child, region = torch.from_numpy(pairs.child), torch.from_numpy(pairs.region)
    assert len(child) == 16
    column, row = torch.from_numpy(pairs.offset_l0).div(256, rounding_mode="floor").unbind(1)
    slot = 4 * row + column
    # The way of scales that were tiled on their own: windows of tokens.
    offset = given["coords_20x"] - given["coords_5x"]
    start, inside = token_windows(offset, 64, 16, 4, window="released")

    for layers in ((0,), (1,), (0, 1, 10), (0, 1, 11)):
        key = "loss/aligned/patch_kd_layers_" + "_".join(map(str, layers))
        own = {layer: teacher[layer][child] for layer in layers}
        ledger.expect(key, patch_distillation_loss(tokens, own, region, slot, ratio=4).total)
        own = {layer: teacher[layer][inside] for layer in layers}
        in_region = torch.zeros(int(inside.sum()), dtype=torch.int64)
        ledger.expect(key, window_distillation_loss(tokens, own, in_region, start[inside], block=4).total)

    # The recording gave this loss all 19 children as the region's own, also the three outside its footprint.
    student, embeddings = given["student_final"][None], given["teacher_final"]
    own_region = torch.zeros(19, dtype=torch.int64)
    for sign, key in (("pos", "pos"), ("neg", "neg(uniform fallback)")):
        loss = attention_feature_loss(student, embeddings, given[f"teacher_attn_{sign}"], own_region)
        ledger.expect(f"loss/aligned/attn_weighted_feature_{key}", loss)
    ledger.insist_on_all()


def test_transposed_slots_do_not_match_stage1(golden: Callable[[str], Any]) -> None:
    file = golden("lrmil_stage1_losses")
    given = _tensors(file, "in/aligned/")
    pairs = match_by_containment(given["coords_5x"][None].numpy(), given["coords_20x"].numpy(), 1024, 256)
    column, row = torch.from_numpy(pairs.offset_l0 // 256).unbind(1)
    teacher = {0: given["hr_cls_layer0"][torch.from_numpy(pairs.child)]}
    swapped = patch_distillation_loss(
        {0: given["lr_tokens_layer0"]}, teacher, torch.from_numpy(pairs.region), 4 * column + row, ratio=4
    )
    with pytest.raises(AssertionError):
        file.expect("loss/aligned/patch_kd_layers_0", swapped.total)


def test_stage2(golden: Callable[[str], Any]) -> None:
    ledger = Ledger(golden("lrmil_stage2_D768_C2"))
    teacher_head = load_original("lrmil", _tensors(ledger.file, "param/teacher/"))
    student_head = load_original("lrmil", _tensors(ledger.file, "param/student/"))
    for case in ("N37", "N200"):
        given = _tensors(ledger.file, f"in/{case}/")
        label = given["label"][None]
        teacher, student = teacher_head(given["teacher_bag"]), student_head(given["student_bag"])
        for who, out in (("teacher", teacher), ("student", student)):
            ledger.expect(f"out/{case}/{who}_logits", out.logits)
            ledger.expect(f"out/{case}/{who}_bagfeat", out.bag_feature)
            ledger.expect(f"out/{case}/{who}_attn_logits", out.attention_logits)
        ledger.expect(f"loss/{case}/ce", torch.nn.functional.cross_entropy(student.logits[None], label))
        ledger.expect(f"loss/{case}/teacher_ce", torch.nn.functional.cross_entropy(teacher.logits[None], label))

        pairs = match_by_containment(given["coords_5x"].numpy(), given["coords_20x"].numpy(), 1024, 256)
        child, region, count = torch.from_numpy(pairs.child), torch.from_numpy(pairs.region), len(given["coords_5x"])
        assert len(np.unique(pairs.region)) < count, "the file should have regions without a child"
        raw, soft = teacher.attention_logits[child], teacher.attention[child]
        scores = region_scores(raw, region, count)
        softmaxed = region_scores(soft, region, count)
        ledger.expect(f"out/{case}/guided_mean(raw attn logits)", scores.score)
        ledger.expect(f"out/{case}/guided_mean(softmaxed attn)", softmaxed.score)
        for values, name in ((raw, "raw attn logits"), (soft, "softmaxed attn")):
            largest = region_scores(values, region, count, aggregation="max")
            ledger.expect(f"out/{case}/guided_max({name})", largest.score)

        for t in (1, 2, 4):
            ledger.expect(
                f"loss/{case}/bag_kd_T{t}", bag_distillation_loss(student.logits, teacher.logits, temperature=t)
            )
            for guide, reduction, name in (
                (scores, "mean", "as released: divided by N"),
                (scores, "sum", "true KL = N x released"),
                (softmaxed, "mean", "softmaxed guide, as released"),
            ):
                loss = soft_attention_loss(
                    student.attention_logits, guide, temperature=t, unmatched="released", reduction=reduction
                )
                ledger.expect(f"loss/{case}/attention_kl_T{t}({name})", loss)
        for k in (1, 4, 8, 1000):
            loss = hard_attention_loss(student.instance_logits, scores, k=k, unmatched="released")
            ledger.expect(f"loss/{case}/hard_top{k}", loss)
        top, bottom = top_and_bottom(scores.score, 4)
        ledger.expect(f"out/{case}/top4_index", top)
        ledger.expect(f"out/{case}/bottom4_index", bottom)

        student_head.zero_grad()
        hard_attention_loss(student.instance_logits, scores, k=4, unmatched="released").backward()
        reached = any(
            p.grad is not None and bool(p.grad.any())
            for name, p in student_head.named_parameters()
            if not name.startswith("instance_classifier")
        )
        ledger.expect(f"out/{case}/hard_loss_grad_reaches_attention_or_bag_head", float(reached))
    ledger.insist_on_all()
