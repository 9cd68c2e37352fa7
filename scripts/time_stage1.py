"""Where the time of stage 1 goes: share of the loss, of waiting for data, of the optimiser; printed as one JSON line.

    python scripts/time_stage1.py lrmil-small
    python scripts/time_stage1.py dinov2-small --weights FILE --patch-px 224 --batch-size 8

Pixels are random, targets come from a feature file as in a run. Weights, unless named, are the encoder's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lrmil.bags import Bag, write_bag
from lrmil.distill import patch_distillation_loss
from lrmil.encoders import create_encoder
from lrmil.pipeline.pixels import SlidePixels
from lrmil.pipeline.regions import CachedTargets, CohortRegions
from lrmil.training.stage1 import Stage1Settings, _Step, distil_encoder, student_layers

RATIO = 4


def make_regions(folder: Path, count: int, patch_px: int, width: int, layers: list[int], slides: int) -> CohortRegions:
    """Write feature files of some slides and put their regions together, as a run does."""
    rng = np.random.default_rng(0)
    parts = []
    for slide in range(slides):
        rows = count // slides
        children = rows * RATIO**2
        bag = Bag(
            features=rng.standard_normal((children, width)).astype(np.float16),
            coords_l0=np.zeros((children, 2), np.int64),
            region=np.repeat(np.arange(rows), RATIO**2),
            slot=np.tile(np.arange(RATIO**2), rows),
            layer_cls={layer: rng.standard_normal((children, width)).astype(np.float16) for layer in layers},
        )
        path = folder / f"{slide}.h5"
        write_bag(path, bag)
        images = rng.integers(0, 256, (rows, patch_px, patch_px, 3), dtype=np.uint8)
        parts.append((SlidePixels(np.arange(rows), images), CachedTargets(path, layers)))
    return CohortRegions(parts, "train")


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median of some repeats, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("--weights")
    parser.add_argument("--patch-px", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=6, help="steps of the epoch that is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    student = create_encoder(asked.encoder, weights=asked.weights, input_px=asked.patch_px).to(device)
    settings = Stage1Settings(batch_size=asked.batch_size, epochs=1)
    layers = student_layers(settings, student.depth, student.depth)
    with tempfile.TemporaryDirectory() as folder:
        count = asked.batch_size * asked.batches
        regions = make_regions(
            Path(folder), count, student.input_px, student.trunk_width, list(layers), slides=min(8, asked.batches)
        )
        step = _Step(student, layers, settings, RATIO, device)
        batch = regions.batch(np.arange(asked.batch_size))
        with torch.no_grad():
            tokens = step._output(batch).tokens
        tokens = {layer: values.detach().requires_grad_() for layer, values in tokens.items()}
        targets = {layer: step._tensor(values) for layer, values in batch.teacher_cls.items()}
        region, slot = step._tensor(batch.region), step._tensor(batch.slot)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-5)
        step.learn(batch)

        def loss() -> None:
            patch_distillation_loss(tokens, targets, region, slot, ratio=RATIO).total.backward()

        parts = {
            "step": lambda: step.learn(batch),
            "loss": loss,
            "optimiser": optimizer.step,
            "loading": lambda: regions.batch(np.arange(asked.batch_size)),
            "normalising": lambda: student.normalise(step._tensor(batch.images)),
        }
        seconds = {name: median_seconds(work, asked.repeats, device) for name, work in parts.items()}
        record = distil_encoder(
            student, regions, regions, settings.model_copy(update={"epochs": 2}), ratio=RATIO, seed=0, device=device
        ).history[-1]
    trained = record["train_steps_s"] + record["train_loading_s"]
    print(
        json.dumps(
            {
                "encoder": student.card.name,
                "device": str(device),
                "threads": asked.threads,
                "batch_size": asked.batch_size,
                "milliseconds": {name: round(1000 * value, 2) for name, value in seconds.items()},
                "loss_share_of_step": round(seconds["loss"] / (seconds["step"] + seconds["optimiser"]), 4),
                "waiting_share_of_epoch": round(record["train_loading_s"] / trained, 4),
                "regions_per_second": round(len(regions) / trained, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
