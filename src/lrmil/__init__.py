"""Train with 20x, deploy with 5x: cross-resolution knowledge distillation for whole-slide classification."""

from lrmil._version import __version__

__all__ = ["__version__"]
