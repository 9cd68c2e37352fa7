"""Mean and max pooling, the two heads without attention.

For instances h_n in R^D:

    mean_pool   Z = (1/N) sum_n h_n          y = W Z + b
    max_pool    Z_d = max_n h_{n,d}          y = W Z + b

The maximum is taken of each feature on its own, so Z is in general no instance of the bag; `instance_max` picks a whole
instance instead. Wang, Yan, Tang, Bai, Liu: Revisiting multiple instance neural networks, Pattern Recognition 74, 2018.
"""

from __future__ import annotations

from torch import Tensor, nn

from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.card import HeadCard
from lrmil.mil.registry import register_head
from lrmil.settings import Settings

_CITATION = "Wang et al., Revisiting multiple instance neural networks, Pattern Recognition 2018"


class _Pooling(MILHead):
    def __init__(self, in_dim: int, num_classes: int, options: Settings) -> None:
        super().__init__(in_dim, num_classes, options)
        self.classifier = nn.Linear(in_dim, num_classes)

    def pool(self, bag: Tensor) -> Tensor:
        raise NotImplementedError

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Pool and classify."""
        pooled = self.pool(bag)
        return HeadOutput(logits=self.classifier(pooled), bag_feature=pooled)


@register_head(
    HeadCard(
        name="mean_pool",
        title="Mean of the instances",
        citation=_CITATION,
        licence_note="no program was followed",
        gives_attention=False,
    )
)
class MeanPool(_Pooling):
    """See the top of this file."""

    def pool(self, bag: Tensor) -> Tensor:
        """Return the mean (D,) of the instances."""
        return bag.mean(dim=0)


@register_head(
    HeadCard(
        name="max_pool",
        title="Largest value of each feature over the instances",
        citation=_CITATION,
        licence_note="no program was followed",
        gives_attention=False,
    )
)
class MaxPool(_Pooling):
    """See the top of this file."""

    def pool(self, bag: Tensor) -> Tensor:
        """Return the maximum (D,) of each feature."""
        smallest, largest = bag.aminmax(dim=0)
        # A maximum passes over -inf. Times zero it becomes NaN, which the check of the logits then finds.
        return largest + 0.0 * smallest
