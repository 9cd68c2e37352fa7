"""Stage "teacher" (2.1): for each fold, a head on 20x features learns the slide labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lrmil.bags import Bag
from lrmil.encoders import Encoder
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.encode import features_name
from lrmil.pipeline.heads import Outputs, head_outputs, read_bags
from lrmil.pipeline.keys import label_head_key, label_head_settings
from lrmil.training.loop import OnEpoch
from lrmil.training.seeds import derive_seed
from lrmil.training.stage2 import SlideBag, TrainedHead, train_teacher


def teacher_bags(run: Run, slides: Sequence[str], encoder: Encoder) -> dict[str, Bag]:
    """Read the 20x features of these slides."""
    name = features_name(encoder, run.settings.grid.hr_mpp, run.settings.encoder.random_seed)
    return read_bags({s: run.folder.bag(name, s) for s in slides})


def teacher_outputs(run: Run, split: Split, bags: Mapping[str, Bag], encoder: Encoder) -> Outputs:
    """Train a fold's teacher head, or load it; return what it says about every slide."""
    return label_head_outputs(run, split, bags, encoder, "teacher", "20x teacher")


def label_head_outputs(
    run: Run, split: Split, bags: Mapping[str, Bag], encoder: Encoder, name: str, title: str
) -> Outputs:
    """Train a head on labels alone: the teacher, or a baseline at 5x without a teacher (see `label_head_settings`).

    Args:
        run: the run.
        split: the fold.
        bags: features of every slide of the fold.
        encoder: what made them.
        name: folder of the head within the fold.
        title: for the progress bar.
    """
    s = run.settings
    seed = derive_seed(s.seed, split.name, "head")
    key = label_head_key(run, split, encoder, name)

    def train(train_bags: Sequence[SlideBag], val_bags: Sequence[SlideBag], on_epoch: OnEpoch) -> TrainedHead:
        return train_teacher(
            train_bags,
            val_bags,
            label_head_settings(run, name),
            objective=run.objective,
            seed=seed,
            device=run.device,
            on_epoch=on_epoch,
        )

    folder = run.teacher_folder if name == "teacher" and run.teacher_folder else run.folder
    step = folder.fold(split.name) / name
    return head_outputs(run, step, key, bags, split, f"{title}, {split.title}", train)
