"""The class of a bag as a number, for heads whose own losses need it."""

from __future__ import annotations

from torch import Tensor

from lrmil.errors import HeadError


def class_index(label: Tensor, num_classes: int) -> int:
    """Return the scalar `label` as an int in 0..num_classes-1.

    Raises:
        HeadError: it is no scalar, or out of range; a negative index would otherwise choose a class from the end.
    """
    if label.numel() != 1 or not 0 <= (found := int(label)) < num_classes:
        raise HeadError(
            f"a label is {label.tolist()}, but {num_classes} classes are numbered 0 to {num_classes - 1}.",
            fix="Give each bag one class index.",
        )
    return found
