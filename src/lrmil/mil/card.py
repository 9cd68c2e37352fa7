"""What is to be known of a head without building it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lrmil.mil.recipe import Recipe


@dataclass(frozen=True)
class HeadCard:
    """What a user should know about a head before choosing it."""

    name: str
    """Key for `create_head` and the config"""
    title: str
    citation: str
    licence_note: str
    """Licence of the original program, from which nothing was copied"""
    gives_attention: bool
    """True if it weighs every instance by one score, so that it can teach and be taught by attention"""
    recipe: Recipe | None = None
    """How the original program trains it; None where there is no such program for slides"""
    scales: Literal["one", "many"] = "one"
    """"one": a `MILHead`, fed a bag; "many": a `MultiScaleHead`, which chooses what it reads from a `PatchSource`"""
