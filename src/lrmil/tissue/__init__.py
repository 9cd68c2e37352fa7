"""Tissue: where a slide is worth looking at, and how much of any box it covers."""

from lrmil.tissue.mask import TissueMask
from lrmil.tissue.overlay import overlay
from lrmil.tissue.segment import find_tissue, segment_tissue
from lrmil.tissue.settings import TissueSettings

__all__ = ["TissueMask", "TissueSettings", "find_tissue", "overlay", "segment_tissue"]
