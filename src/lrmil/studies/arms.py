"""The arms of region probes that are no recipes, with their titles. No recipe can have their names."""

from __future__ import annotations

REFERENCE = "reference"
"""names the cells of all arms without training together"""
CEILING = "ceiling"
REFERENCE_TITLES = {
    "hr": "20x: 16 children",
    "lr": "5x, not distilled",
    CEILING: "5x, trained on truth",
    "random": "5x, random weights",
    "colour": "5x, colours alone",
}
TAKEN = frozenset({REFERENCE, *REFERENCE_TITLES})
"""Answers are told apart by the name of their arm alone"""
