"""One step of one head, ours or torchmil's: the cases of part `heads`, each measured in a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lrmil.benchmarks.timing import PeakMemory

CLASSES = 2
THUMBNAIL_PX = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "clam_sb": {"subtyping": True},
    "clam_mb": {"subtyping": True},
    # Attention for heatmaps is no part of the answer.
    "transmil": {"rollout": False},
}


def measure_head(case: dict[str, Any]) -> dict[str, Any]:
    """Time the steps of one case in this process, and take their peak memory."""
    import torch

    torch.set_num_threads(case["threads"])
    torch.manual_seed(case["seed"])
    device = torch.device(case["device"])
    build = torchmil_step if case["head"].startswith("torchmil's ") else own_step
    model, step, size = build(case["head"], case["work"], case["size"], case["width"], device)
    peak = PeakMemory(device)
    step()
    seconds: list[float] = []
    began = time.perf_counter()
    while not seconds or time.perf_counter() - began < case["seconds"]:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "instances": size,
        "steps_per_second": 1 / statistics.median(seconds),
        "steps": len(seconds),
        "peak_mb": peak.added_mb(),
        "bag_mb": size * case["width"] * 4 / 1e6,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def own_step(head: str, work: str, size: int, width: int, device: Any) -> tuple[Any, Callable[[], None], int]:
    """Return a head of ours, a function that does one step with it, and how many instances its bag has."""
    import torch
    import torch.nn.functional as F

    from lrmil.mil import MultiScaleHead, create_head

    name, _, part = head.partition(":")
    model = create_head(name, width, CLASSES, **OPTIONS.get(name, {})).to(device)
    label = torch.tensor(1, device=device)
    bag: Any = torch.randn(size, width, device=device)
    coords = None
    if isinstance(model, MultiScaleHead):
        bag, size = source_of(model, bag)
    else:
        side = int(size**0.5) + 1
        places = torch.arange(size)
        coords = 256 * torch.stack([places % side, places // side], dim=1).to(device)

    def ask(**more: Any) -> Any:
        return model(bag, **more) if coords is None else model(bag, coords=coords, **more)

    if work == "predict":
        return model, predicting(model, ask), size
    model.train()
    if isinstance(model, MultiScaleHead):
        model.begin_step(part or model.steps[0])

    def loss() -> Any:
        output = ask(label=label)
        return model.total_loss(output, F.cross_entropy(output.logits[None], label[None]))

    return model, training(model, loss), size


def torchmil_step(head: str, work: str, size: int, width: int, device: Any) -> tuple[Any, Callable[[], None], int]:
    """Do the same with a class of torchmil."""
    import torch

    model = getattr(import_module("torchmil.models"), head.partition(" ")[2])(in_shape=(width,)).to(device)
    bag, label = torch.randn(1, size, width, device=device), torch.ones(1, device=device)
    # Its DTFD-MIL cannot do without the mask of bags that are filled up.
    more = {"mask": torch.ones(1, size, dtype=torch.bool, device=device)} if head.endswith("DTFDMIL") else {}
    if work == "predict":
        return model, predicting(model, lambda: model(bag, **more)), size
    model.train()

    def loss() -> Any:
        return sum(model.compute_loss(label, bag, **more)[1].values())

    return model, training(model, loss), size


def source_of(model: Any, bag: Any) -> tuple[Any, int]:
    """Return a slide in memory for a head that chooses its patches, and how many patches its finest scale has."""
    import torch

    from lrmil.mil import StoredScales

    if model.scales == ("high",):
        thumbnails = torch.randint(0, 256, (len(bag), THUMBNAIL_PX, THUMBNAIL_PX, 3), dtype=torch.uint8)
        return StoredScales({"high": bag}, thumbnails=thumbnails.to(bag.device)), len(bag)
    regions = max(1, len(bag) // 16)
    low, mid = bag[:regions], bag[: 4 * regions]
    return StoredScales({"low": low, "mid": mid, "high": bag[: 16 * regions]}), 16 * regions


def predicting(model: Any, ask: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that answers once."""
    import torch

    model.eval()

    def step() -> None:
        with torch.inference_mode():
            ask()

    return step


def training(model: Any, loss: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that makes one step of Adam."""
    import torch

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step
