"""From slides to batches of patches, and to what an encoder says about them.

reads.py       what to ask of a slide
feed.py        reader threads fill batches, from one slide after another, within a bound on memory
patches.py     the patches of one slide, batch by batch
encoding.py    patches of one slide, or of many, through an encoder
upload.py      batches on their way to a GPU
"""

from lrmil.inference.stream.batches import ReadingLog, SlideReads
from lrmil.inference.stream.encoding import EncodedPatches, EncodedSlide, encode_patches, encode_slides
from lrmil.inference.stream.patches import PatchBatch, stream_patches
from lrmil.inference.stream.reads import Read, child_reads, region_reads

__all__ = [
    "EncodedPatches",
    "EncodedSlide",
    "PatchBatch",
    "Read",
    "ReadingLog",
    "SlideReads",
    "child_reads",
    "encode_patches",
    "encode_slides",
    "region_reads",
    "stream_patches",
]
