"""Bags: one HDF5 file of features and places per slide, and the feature files of other programs."""

from lrmil.bags.bag import Bag
from lrmil.bags.foreign import read_foreign_bag
from lrmil.bags.provenance import check_provenance, software_versions
from lrmil.bags.store import bag_is_current, map_rows, read_bag, write_bag
from lrmil.bags.trident import write_trident_bag

__all__ = [
    "Bag",
    "bag_is_current",
    "check_provenance",
    "map_rows",
    "read_bag",
    "read_foreign_bag",
    "software_versions",
    "write_bag",
    "write_trident_bag",
]
