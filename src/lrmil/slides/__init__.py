"""Slides: pixels of any box of a whole-slide image, at any scale, by area average, whatever the vendor."""

from lrmil.slides.base import Slide
from lrmil.slides.levels import Level
from lrmil.slides.overview import Overview
from lrmil.slides.recording import ReadRequest, RecordingSlide
from lrmil.slides.registry import ReaderCard, open_slide, reader_cards, register_reader
from lrmil.slides.stats import ReadStats, io_counter
from lrmil.slides.writer import write_pyramid

__all__ = [
    "Level",
    "Overview",
    "ReadRequest",
    "ReadStats",
    "ReaderCard",
    "RecordingSlide",
    "Slide",
    "io_counter",
    "open_slide",
    "reader_cards",
    "register_reader",
    "write_pyramid",
]
