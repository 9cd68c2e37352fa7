"""What linear probes read from `lrmil-small`, from the same network with random weights, and from DINOv2 ViT-S/14.

    python scripts/probe_small_encoder.py --weights src/lrmil/encoders/weights --data DATA --out probes.json

Three questions, each at 20x (0.5 um per pixel) and at 5x (2.0), each a logistic regression on frozen embeddings:

* simulated: does the chromatin of the glands in a region of 256 level-0 px show the positive pattern? 20x: the mean of
  the embeddings of the region's 16 children; 5x: the embedding of the region. Tiles are drawn with seeds that neither
  pretraining nor any cohort uses; folds keep tiles of one field together.
* real, nuclei: which kind of nucleus lies in the middle of a 64-px field at 20x of CRCHistoPhenotypes (research use:
  for evaluation only)? 5x: the same field averaged to 16 px and enlarged again, so that only resolution differs.
* real, fields: which kind makes up most of the labelled nuclei of a 125-px field? 20x: the mean of 4 children of 64 px.
  5x: the field at 2.0 um per pixel, enlarged to the side that the network wants.

Folds of the real questions are grouped by image. AUC is averaged over 5 folds and `--repeats` deals of the groups; its
standard error comes from resampling the groups (200 times) with the predictions held fixed.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer

from lrmil.cohorts.simulated import render_tile
from lrmil.cohorts.simulated.nuclei import EPITHELIAL
from lrmil.cohorts.simulated.settings import SimulatedSettings
from lrmil.files import read_json, sha256, write_json

Tiles = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]

PROBE_SEED = 991_000
"""Tiles of the simulator use the seeds 991,000 to 991,999: not those of pretraining, not those of a cohort."""
SIDE = 64


@dataclass(frozen=True)
class Network:
    """A frozen network and the pixels it wants."""

    name: str
    fingerprint: str
    """of the weights; names the files of `--cache`"""
    vit: VisionTransformer
    input_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.inference_mode()
    def embed(self, tiles: Tiles, batch: int = 64) -> Features:
        """Normalised class token, (n, W), of tiles (n, s, s, 3) uint8 enlarged to the network's input."""
        out = []
        for start in range(0, len(tiles), batch):
            x = torch.from_numpy(tiles[start : start + batch]).permute(0, 3, 1, 2).float() / 255
            x = (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
            if x.shape[-1] != self.input_px:
                x = F.interpolate(x, size=(self.input_px, self.input_px), mode="bicubic")
            out.append(self.vit.forward_features(x)[:, 0].numpy())
        return np.concatenate(out)


def load_networks(weights: Path, teacher: Path | None) -> list[Network]:
    """Return lrmil-small, its random twin, and the teacher where its weights are given."""
    card = read_json(weights / "lrmil-small.json")
    networks = []
    for name in ("lrmil-small", "random weights"):
        torch.manual_seed(0)
        vit = VisionTransformer(
            img_size=card["input_px"], patch_size=card["token_px"], embed_dim=card["width"], depth=card["depth"],
            num_heads=card["heads"], num_classes=0, dynamic_img_size=True,
        )  # fmt: skip
        if name == "lrmil-small":
            vit.load_state_dict({k: v.float() for k, v in load_file(weights / "lrmil-small.safetensors").items()})
        fingerprint = card["sha256"] if name == "lrmil-small" else f"random-{card['width']}-{card['heads']}"
        networks.append(
            Network(name, fingerprint, vit.eval(), card["input_px"], tuple(card["mean"]), tuple(card["std"]))
        )
    if teacher is not None:
        vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
        vit.load_state_dict({k: v.float() for k, v in load_file(teacher).items()})
        networks.append(
            Network("DINOv2 ViT-S/14", sha256(teacher), vit.eval(), 112, tuple(card["mean"]), tuple(card["std"]))
        )
    return networks


def children(regions: Tiles) -> Tiles:
    """Cut (n, r * 64, r * 64, 3) into (n, r * r, 64, 64, 3), row by row."""
    n, side = len(regions), regions.shape[1] // SIDE
    return (
        regions.reshape(n, side, SIDE, side, SIDE, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, side * side, SIDE, SIDE, 3)
    )


def mean_of_children(network: Network, regions: Tiles) -> Features:
    parts = children(regions)
    return network.embed(parts.reshape(-1, SIDE, SIDE, 3)).reshape(len(regions), parts.shape[1], -1).mean(1)


def shrink(tiles: Tiles, factor: int) -> Tiles:
    """Average blocks of factor x factor pixels."""
    n, h, w, _ = tiles.shape
    blocks = tiles.reshape(n, h // factor, factor, w // factor, factor, 3).astype(np.float32)
    return blocks.mean((2, 4)).round().astype(np.uint8)


def enlarge(tiles: Tiles, side: int) -> Tiles:
    """Enlarge by cubic interpolation."""
    return np.stack([cv2.resize(tile, (side, side), interpolation=cv2.INTER_CUBIC) for tile in tiles])


def simulated_regions(fields: int) -> tuple[Tiles, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Regions (n, 256, 256, 3) with at least 12 epithelial nuclei, whether they are positive, and their field."""
    regions, labels, groups = [], [], []
    for number in range(fields):
        rng = np.random.default_rng([PROBE_SEED, number])
        settings = SimulatedSettings(seed=PROBE_SEED + number * 4 // fields)
        image, truth = render_tile(rng, settings, 1024, positive=bool(number % 2))
        for y in range(0, 1024, 256):
            for x in range(0, 1024, 256):
                inside = (truth.x_px // 256 * 256 == x) & (truth.y_px // 256 * 256 == y) & (truth.kind == EPITHELIAL)
                if inside.sum() >= 12:
                    share = truth.pattern[inside].astype(bool).mean()
                    if share > 0.6 or share < 0.2:
                        regions.append(image[y : y + 256, x : x + 256])
                        labels.append(int(share > 0.6))
                        groups.append(number)
    return np.stack(regions), np.array(labels), np.array(groups)


def real_nuclei(folder: Path, per_image: int) -> tuple[Tiles, npt.NDArray[np.str_], npt.NDArray[np.int64]]:
    """Return 64-px fields around nuclei, their kind and their image; at most `per_image` of a kind from one image."""
    table = pd.read_csv(folder / "nuclei.csv.gz")
    tiles, kinds, groups = [], [], []
    for number, (name, nuclei) in enumerate(table.groupby("image")):
        image = np.pad(
            np.array(Image.open(folder / "images" / f"{name}.png").convert("RGB")),
            ((SIDE // 2, SIDE // 2), (SIDE // 2, SIDE // 2), (0, 0)), mode="reflect",
        )  # fmt: skip
        for kind, some in nuclei.groupby("cls"):
            for row in some.sample(min(len(some), per_image), random_state=number).itertuples():
                x, y = int(min(row.x, 499)), int(min(row.y, 499))
                tiles.append(image[y : y + SIDE, x : x + SIDE])
                kinds.append(kind)
                groups.append(number)
    return np.stack(tiles), np.array(kinds), np.array(groups)


def real_fields(folder: Path) -> tuple[Tiles, npt.NDArray[np.str_], npt.NDArray[np.int64]]:
    """Return 125-px fields resized to 128, the kind of over half of their (at least 4) nuclei, and their image."""
    table = pd.read_csv(folder / "nuclei.csv.gz")
    tiles, kinds, groups = [], [], []
    for number, (name, nuclei) in enumerate(table.groupby("image")):
        image = np.array(Image.open(folder / "images" / f"{name}.png").convert("RGB"))
        for cell, some in nuclei.groupby([(nuclei.y // 125).clip(0, 3), (nuclei.x // 125).clip(0, 3)]):
            y, x = (int(value) * 125 for value in cell)
            top = some.cls.value_counts(normalize=True)
            if len(some) >= 4 and top.iloc[0] > 0.5:
                tiles.append(cv2.resize(image[y : y + 125, x : x + 125], (128, 128), interpolation=cv2.INTER_CUBIC))
                kinds.append(top.index[0])
                groups.append(number)
    return np.stack(tiles), np.array(kinds), np.array(groups)


def probe(
    features: Features, labels: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], repeats: int
) -> tuple[float, float, npt.NDArray[np.float64]]:
    """AUC, its standard error over resampled groups, and the resampled AUCs (equal draws for equal groups)."""
    logits = np.zeros((repeats, len(labels)))
    for repeat in range(repeats):
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=repeat)
        for train, test in folds.split(features, labels, groups):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500, class_weight="balanced"))
            model.fit(features[train], labels[train])
            logits[repeat, test] = model.decision_function(features[test])
    score = logits.mean(0)
    rng = np.random.default_rng(0)
    members = {g: np.flatnonzero(groups == g) for g in np.unique(groups)}
    draws = []
    while len(draws) < 200:
        rows = np.concatenate([members[g] for g in rng.choice(list(members), len(members))])
        if 0 < labels[rows].mean() < 1:
            draws.append(roc_auc_score(labels[rows], score[rows]))
    return float(roc_auc_score(labels, score)), float(np.std(draws)), np.array(draws)


def embedded(cache: Path | None, network: Network, scale: str, embed: Callable, tiles: Tiles) -> Features:
    """`embed(network, tiles)`, read from the folder `cache` where it was kept before."""
    if cache is None:
        return embed(network, tiles)
    key = hashlib.sha256(f"{network.fingerprint} {network.input_px} {scale}".encode() + tiles.tobytes()).hexdigest()
    path = cache / f"{key}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, embed(network, tiles))
    return np.load(path)


def questions(args: argparse.Namespace) -> list[tuple[str, Tiles, Callable, Callable, npt.NDArray, npt.NDArray]]:
    """Name, tiles, how to embed them at 20x and at 5x, labels (-1: left out) and groups."""
    out = []
    if args.fields:
        regions, labels, groups = simulated_regions(args.fields)
        coarse: Callable = lambda net, tiles: net.embed(shrink(tiles, 4))  # noqa: E731
        out.append(("simulated: positive chromatin", regions, mean_of_children, coarse, labels, groups))
    crchisto = args.data / "crchisto"
    if crchisto.is_dir():
        at_20x: Callable = lambda net, tiles: net.embed(tiles)  # noqa: E731
        at_5x: Callable = lambda net, tiles: net.embed(enlarge(shrink(tiles, 4), SIDE))  # noqa: E731
        tiles, kinds, groups = real_nuclei(crchisto, args.per_image)
        pairs = (("fibroblast", "inflammatory"), ("epithelial", "fibroblast"), ("epithelial", None))
        for one, other in pairs:
            labels = np.where(kinds == one, 1, np.where((kinds == other) | (other is None), 0, -1))
            out.append((f"nuclei: {one} or {other or 'any other'}", tiles, at_20x, at_5x, labels, groups))
        tiles, kinds, groups = real_fields(crchisto)
        fine: Callable = lambda net, tiles: mean_of_children(net, tiles)  # noqa: E731
        low: Callable = lambda net, tiles: net.embed(shrink(tiles, 4))  # noqa: E731
        for one, other in pairs:
            labels = np.where(kinds == one, 1, np.where((kinds == other) | (other is None), 0, -1))
            out.append((f"fields: {one} or {other or 'any other'}", tiles, fine, low, labels, groups))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of lrmil-small.safetensors and .json")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crchisto/")
    parser.add_argument("--teacher", type=Path, help="safetensors of DINOv2 ViT-S/14, for comparison")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--cache", type=Path, help="folder that keeps embeddings between calls")
    parser.add_argument("--fields", type=int, default=24, help="fields of simulated tissue, 16 regions each; 0: none")
    parser.add_argument("--per-image", type=int, default=8, help="nuclei of each kind from one image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    networks = load_networks(args.weights, args.teacher)
    rows, done = [], {}
    for name, tiles, fine, coarse, labels, groups in questions(args):
        used = labels >= 0
        for network in networks:
            both = []
            for scale, embed in (("20x", fine), ("5x", coarse)):
                key = (network.name, scale, id(tiles))
                if key not in done:
                    done[key] = embedded(args.cache, network, scale, embed, tiles)
                both.append(probe(done[key][used], labels[used], groups[used], args.repeats))
            (a20, se20, d20), (a5, se5, d5) = both
            row = {
                "question": name, "network": network.name, "n": int(used.sum()), "groups": len(np.unique(groups[used])),
                "positives": int(labels[used].sum()), "auc_20x": a20, "se_20x": se20, "auc_5x": a5, "se_5x": se5,
                "difference": a20 - a5, "se_difference": float(np.std(d20 - d5)),
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name:42s} {network.name:16s} n={row['n']:5d}  20x {a20:.3f} ±{se20:.3f}   5x {a5:.3f} ±{se5:.3f}   "
                f"20x - 5x {row['difference']:+.3f} ±{row['se_difference']:.3f}",
                flush=True,
            )
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
