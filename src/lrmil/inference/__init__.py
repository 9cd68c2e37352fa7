"""Deployment: a bundle, its answers to slides, and what they rest on. Nothing here trains or reads the HR encoder.

`inspect` (what a slide is, what this machine has) and the drawing in `heatmap` are imported from their modules.
"""

from lrmil.inference.bundle import BundleManifest, read_manifest, save_bundle
from lrmil.inference.predict import Bundle, Prediction, load_bundle

__all__ = ["Bundle", "BundleManifest", "Prediction", "load_bundle", "read_manifest", "save_bundle"]
