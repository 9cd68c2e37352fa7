"""Stage "student" (2.2): for each fold, a head on the student's 5x features learns from labels and the teacher head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lrmil.bags import Bag
from lrmil.encoders import Encoder
from lrmil.errors import BagError
from lrmil.geometry import IntArray
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.heads import Outputs, head_outputs
from lrmil.pipeline.keys import student_key
from lrmil.pipeline.teacher import label_head_outputs
from lrmil.training.loop import OnEpoch
from lrmil.training.seeds import derive_seed
from lrmil.training.stage2 import SlideBag, TeacherSignal, TrainedHead, teacher_signal, train_student


def student_outputs(
    run: Run,
    split: Split,
    lr_bags: Mapping[str, Bag],
    hr_bags: Mapping[str, Bag],
    teacher: Outputs,
    teacher_encoder: Encoder,
    student: Encoder,
) -> Outputs:
    """Train a fold's student head, or load it; return what it says about every slide. 20x is used in training only."""
    s = run.settings
    # The same seed as the heads trained on labels alone: with all lambdas 0 the student is that head, bit for bit.
    seed = derive_seed(s.seed, split.name, "head")
    key = student_key(run, split, student, teacher_encoder)

    def train(train_bags: Sequence[SlideBag], val_bags: Sequence[SlideBag], on_epoch: OnEpoch) -> TrainedHead:
        signals = {
            b.slide_id: _signal(lr_bags[b.slide_id], hr_bags[b.slide_id], teacher, b.slide_id) for b in train_bags
        }
        return train_student(
            train_bags,
            val_bags,
            signals,
            s.student,
            objective=run.objective,
            seed=seed,
            device=run.device,
            on_epoch=on_epoch,
        )

    step = run.folder.fold(split.name) / "student"
    return head_outputs(run, step, key, lr_bags, split, f"5x student, {split.title}", train)


def lr_only_outputs(run: Run, split: Split, bags: Mapping[str, Bag], encoder: Encoder) -> Outputs:
    """Train a head on the frozen encoder's 5x features and labels alone: LR without any distillation."""
    return label_head_outputs(run, split, bags, encoder, "lr_only", "5x without distillation")


def rows_of_children(lr: Bag, hr: Bag) -> IntArray:
    """Return, for each child (M,), the row of its region in the LR bag, or -1 if that region could not be read."""
    if lr.region is None or hr.region is None:
        raise BagError("these features do not say which child lies in which region.", fix="Encode the slides again.")
    rows = np.full(int(max(lr.region.max(initial=-1), hr.region.max(initial=-1))) + 1, -1, dtype=np.int64)
    rows[lr.region] = np.arange(len(lr.region))
    return rows[hr.region]


def _signal(lr: Bag, hr: Bag, teacher: Outputs, slide_id: str) -> TeacherSignal:
    return teacher_signal(teacher[slide_id], rows_of_children(lr, hr))
