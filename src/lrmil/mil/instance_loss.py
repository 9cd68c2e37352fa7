"""CLAM's instance loss, which DMIN takes over: what the attention puts at its two ends is told apart.

For a bag of class Y, with B = min(k_sample, N) and one two-way classifier of instances for each class:

    class Y          top B by s_Y have target 1, bottom B target 0
    other classes c  only if subtyping: top B by s_c have target 0
    L_inst = sum over these classes of the mean loss of their rows; divided by C if subtyping

Lu, Williamson, Chen, Chen, Barbieri, Mahmood: Data-efficient and weakly supervised computational pathology on
whole-slide images, Nature Biomedical Engineering 5, 2021.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def judge_instances(
    embedded: Tensor,
    branches: Tensor,
    label: int,
    classifiers: nn.ModuleList,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    k_sample: int,
    subtyping: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the instance loss.

    Args:
        embedded: (N, H).
        branches: (N, C) attention logits, a column a class, or (N, 1), which ranks for all. Logits rank instances as
            their softmax does, but do not underflow.
        label: class of the bag.
        classifiers: one a class, (n, H) to (n, 2).
        loss: of verdicts (R, 2) and targets (R,), their mean.
        k_sample: instances taken from either end; where there are fewer, all of them.
        subtyping: classes exclude each other.

    Returns:
        The loss before its weight; targets (R,) and predictions (R,) of the rows, class by class, each from the most
        attended instance on and then from the least attended.
    """
    k = min(k_sample, len(embedded))
    total, targets, predictions = embedded.new_zeros(()), [], []
    for c, classifier in enumerate(classifiers):
        if c != label and not subtyping:
            continue
        ranking = branches[:, c if branches.shape[1] > 1 else 0].detach()
        rows = ranking.topk(k).indices
        wanted = torch.full((k,), int(c == label), device=rows.device)
        if c == label:
            rows = torch.cat([rows, ranking.topk(k, largest=False).indices])
            wanted = torch.cat([wanted, torch.zeros_like(wanted)])
        verdicts = classifier(embedded[rows])
        total = total + loss(verdicts, wanted)
        targets.append(wanted)
        predictions.append(verdicts.argmax(dim=1))
    if subtyping:
        total = total / len(classifiers)
    return total, torch.cat(targets), torch.cat(predictions)
