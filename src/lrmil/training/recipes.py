"""Which recipe a head is trained by: the one for all methods, or that of the method's own program."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lrmil.errors import ConfigError, HeadError
from lrmil.mil import HeadSettings, head_cards
from lrmil.mil.recipe import Recipe
from lrmil.training.loop import LoopSettings


class HeadTrainingSettings(LoopSettings):
    """Which head, and how it is trained. With `recipe: original` only `head` counts: all numbers are the program's."""

    head: HeadSettings = HeadSettings()
    recipe: Literal["paper", "original"] = Field(
        "paper",
        description="paper: Adam with the numbers given here, for all methods alike; original: optimiser, learning "
        "rate, schedule, epochs and choice of epoch of the head's own program, whatever stands here",
    )
    select_by: Literal["score", "loss"] = Field(
        "score", description="what chooses the epoch in validation: AUC, R2 or C-index, by task; or the loss"
    )


def training_recipe(settings: HeadTrainingSettings) -> Recipe:
    """Return the recipe that these settings ask for.

    Raises:
        HeadError: no such head.
        ConfigError: the head has no original recipe.
    """
    if settings.recipe == "paper":
        return settings.paper_recipe("auc" if settings.select_by == "score" else "loss")
    cards = {card.name: card for card in head_cards()}
    name = settings.head.name
    if name not in cards:
        raise HeadError(f"there is no head named {name!r}.", fix=f"Choose one of: {', '.join(cards)}.")
    recipe = cards[name].recipe
    if recipe is None:
        known = ", ".join(card.name for card in cards.values() if card.recipe)
        raise ConfigError(
            f"head {name!r} has no original recipe: there is no program for slides to follow.",
            fix=f"Set recipe: paper, or choose one of: {known}.",
        )
    return recipe
