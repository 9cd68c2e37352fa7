"""How fast every head is and how much memory it takes, for bags of several sizes, beside torchmil's own where it is.

    python benchmarks/heads.py                            # all heads and sizes; some minutes on a quiet machine
    python benchmarks/heads.py --heads abmil,dsmil --sizes 1000,10000 --out heads.json

Every case runs in a process of its own, so that none inherits the memory, threads or caches of another. A training step
is forward, loss, backward and Adam on one bag; a prediction is a forward pass in inference mode. Before the clock runs,
each is done once. Peak memory is what steps take beyond the process with its bag and its weights, gradients and Adam's
moments among it: on a GPU as torch counts it, else as the kernel does, where it can be reset (Linux). Bags and weights
are drawn at random.

torchmil's classes are called directly, with their own defaults; their widths therefore differ, see the parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WIDTH, CLASSES = 768, 2
SIZES = (1_000, 10_000, 100_000)
MORE_TRAINING = (50_000,)
THUMBNAIL_PX = 16
TORCHMIL = {"abmil": "ABMIL", "clam_sb": "CLAM_SB", "dsmil": "DSMIL", "transmil": "TransMIL", "dtfd": "DTFDMIL"}
"""Heads that torchmil has, too"""
OPTIONS: dict[str, dict[str, Any]] = {
    "clam_sb": {"subtyping": True},
    "clam_mb": {"subtyping": True},
    # Attention for heatmaps is no part of the answer.
    "transmil": {"rollout": False},
}


def main() -> None:
    """Run all cases, print a Markdown table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", help="comma-separated; default all, with torchmil's beside them")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="instances of a bag")
    parser.add_argument("--training-sizes", help="default: --sizes, and 50000 where these reach it")
    parser.add_argument("--width", type=int, default=WIDTH, help="width of the features")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: as torch chooses")
    parser.add_argument("--seconds", type=float, default=2.0, help="time a case for at least so long")
    parser.add_argument("--limit", type=float, default=600.0, help="give a case up after so many seconds")
    parser.add_argument("--out", type=Path, default=Path("heads.json"), help="JSON of all that was measured")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(measure(json.loads(chosen.case))))
        return

    sizes = [int(size) for size in chosen.sizes.split(",")]
    more = [size for size in MORE_TRAINING if size <= max(sizes)]
    training = [int(s) for s in chosen.training_sizes.split(",")] if chosen.training_sizes else sorted({*sizes, *more})
    shared = {"width": chosen.width, "device": chosen.device, "threads": chosen.threads, "seconds": chosen.seconds}
    cases = [
        {"head": head, "work": work, "size": size, **shared}
        for head in rows(chosen.heads.split(",") if chosen.heads else None)
        for work, own in (("train", training), ("predict", sizes))
        for size in own
        if work in works_of(head)
    ]
    results = []
    for number, case in enumerate(cases, 1):
        results.append(in_own_process(case, chosen.limit))
        print(f"[{number}/{len(cases)}] {said(results[-1])}", file=sys.stderr, flush=True)
    facts = {"machine": machine(chosen.device, chosen.threads), "width": chosen.width, "results": results}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(markdown(facts))


def rows(wanted: Sequence[str] | None) -> list[str]:
    """Names of all rows: every registered head, HDMIL's two steps of training apart, torchmil's behind its namesake."""
    from lrmil.mil import head_cards

    names = [card.name for card in head_cards()] if wanted is None else list(wanted)
    found: list[str] = []
    for name in names:
        found += ["hdmil", "hdmil:lipn"] if name == "hdmil" else [name]
        if name in TORCHMIL and has_torchmil():
            found.append(f"torchmil's {TORCHMIL[name]}")
    return found


def works_of(head: str) -> tuple[str, ...]:
    """Return what is measured of a row."""
    return ("train",) if head == "hdmil:lipn" else ("train", "predict")


def has_torchmil() -> bool:
    """Say whether torchmil is installed."""
    from importlib.util import find_spec

    return find_spec("torchmil") is not None


def in_own_process(case: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Run one case in a fresh process; say what went wrong, if it did."""
    call = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(case)]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return case | {"failed": f"more than {limit_s:g} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return case | {"failed": "killed, out of memory?" if done.returncode < 0 else last[0]}
    return case | json.loads(done.stdout.strip().splitlines()[-1])


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Time the steps of one case in this process, and take their peak memory."""
    import torch

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    device = torch.device(case["device"])
    build = torchmil_step if case["head"].startswith("torchmil's ") else own_step
    model, step, size = build(case["head"], case["work"], case["size"], case["width"], device)
    peak = Peak(device)
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
        "peak_mb": peak.mb(),
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
    import torchmil.models

    model = getattr(torchmil.models, head.partition(" ")[2])(in_shape=(width,)).to(device)
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


class Peak:
    """Peak memory from when this is made."""

    def __init__(self, device: Any) -> None:
        self._cuda = device if device.type == "cuda" else None
        if self._cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) / 1e6
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._before = float("nan")
        else:
            self._before = _status_mb("VmRSS")

    def mb(self) -> float | None:
        """Return what was taken at most since then, in 10^6 bytes; None where that cannot be known."""
        if self._cuda is not None:
            import torch

            return torch.cuda.max_memory_allocated(self._cuda) / 1e6 - self._before
        known = self._before == self._before
        return _status_mb("VmHWM") - self._before if known else None


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def machine(device: str, threads: int) -> dict[str, Any]:
    """Say what was measured on."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else name,
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def said(result: dict[str, Any]) -> str:
    """One line about one case."""
    what = f"{result['head']}, {result['work']}, {result['size']}"
    return f"{what}: {result['failed']}" if "failed" in result else f"{what}: {cell(result)}"


def cell(result: dict[str, Any] | None) -> str:
    """Steps per second, and peak memory."""
    if result is None:
        return ""
    if "failed" in result:
        return "failed"
    speed, peak = result["steps_per_second"], result["peak_mb"]
    return f"{speed:.3g}" + ("" if peak is None else f" ({peak:,.0f} MB)")


def markdown(facts: dict[str, Any]) -> str:
    """Lay all out as a table: heads in lines, work and size in columns."""
    results = facts["results"]
    columns = sorted({(r["work"] != "train", r["size"]) for r in results})
    names = list(dict.fromkeys(r["head"] for r in results))
    found = {(r["head"], r["work"] != "train", r["size"]): r for r in results}
    parameters = {r["head"]: r["parameters"] for r in results if "parameters" in r}
    head = ["Head", "Parameters", *(f"{'predict' if p else 'train'} {size:,}" for p, size in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" + " ---: |" * (len(head) - 1)]
    for name in names:
        count = f"{parameters[name]:,}" if name in parameters else ""
        lines.append("| " + " | ".join([name, count, *(cell(found.get((name, *c))) for c in columns)]) + " |")
    m = facts["machine"]
    lines += [
        "",
        f"Steps per second (peak memory beyond bag and weights), one bag a step, features {facts['width']} wide; "
        f"{m['processor']}, {m['threads']} threads, torch {m['torch']}.",
    ]
    lines += [f"{said(r)}." for r in results if "failed" in r]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
