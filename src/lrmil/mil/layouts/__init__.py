"""Layouts of the original programs' checkpoints, one file a method, collected by the name `load_original` takes."""

from collections.abc import Mapping

from lrmil.mil.layouts.abmil_original import ABMIL_ORIGINAL
from lrmil.mil.layouts.clam import CLAM_MB, CLAM_SB, INSTANCE_MAX
from lrmil.mil.layouts.dsmil import DSMIL
from lrmil.mil.layouts.dtfd import DTFD
from lrmil.mil.layouts.hdmil import DMIN, HDMIL
from lrmil.mil.layouts.layout import OriginalFormat
from lrmil.mil.layouts.lrmil import LRMIL
from lrmil.mil.layouts.transmil import TRANSMIL
from lrmil.mil.layouts.zoommil import ZOOMMIL

LAYOUTS: Mapping[str, tuple[OriginalFormat, ...]] = {
    "abmil": LRMIL,
    "abmil_original": ABMIL_ORIGINAL,
    "clam_mb": CLAM_MB,
    "clam_sb": CLAM_SB,
    "dmin": DMIN,
    "dsmil": DSMIL,
    "dtfd": DTFD,
    "hdmil": HDMIL,
    "instance_max": INSTANCE_MAX,
    "lrmil": LRMIL,
    "transmil": TRANSMIL,
    "zoommil": ZOOMMIL,
}

__all__ = ["LAYOUTS", "OriginalFormat"]
