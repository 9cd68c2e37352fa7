"""The methods that choose their patches: trained on a fold, asked about slides, and timed on slide files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrmil.encoders import Encoder
from lrmil.files import write_json
from lrmil.inference.prepare import prepare_slide
from lrmil.inference.scales import THUMBNAIL
from lrmil.inference.selective import answer_slide
from lrmil.mil import MILHead, MultiScaleHead, PatchSource
from lrmil.mil.readout import Readout
from lrmil.pipeline.context import Run, SlideEntry, Split
from lrmil.pipeline.folder import RunFolder
from lrmil.pipeline.heads import best_score, store_head, stored_head
from lrmil.pipeline.jobs import Epochs, HeadJob
from lrmil.pipeline.keys import features_of, head_key, outputs_key
from lrmil.pipeline.live_scales import live_scales
from lrmil.pipeline.timing import SlideCost, kept_costs, timing_key
from lrmil.settings import fingerprint
from lrmil.slides import io_counter
from lrmil.training.loop import OnEpoch
from lrmil.training.multi_scale import SlideSource, predict_scales, train_scales
from lrmil.training.predict import BagPrediction
from lrmil.training.seeds import derive_seed
from lrmil.training.stage2 import TeacherSettings

_METHOD = 2
"""Of timing; costs measured by another are measured again"""


@dataclass(frozen=True)
class ChoiceJob(HeadJob[SlideSource]):
    """A head that chooses its patches."""

    def train_and_store(self, folder: RunFolder, epochs: Epochs, on_epoch: OnEpoch) -> tuple[str, ...]:
        """Train in all the head's steps, see `train_scales`; if that is cut short it begins with the first again."""
        trained = train_scales(
            self.train,
            self.val,
            self.settings,
            objective=self.objective,
            seed=self.seed,
            device=self.device,
            on_epoch=on_epoch,
        )
        store_head(trained.head, self.step, trained.readout)
        steps = {
            name: {"best_epoch": fit.best_epoch, "selected_by": fit.selected_by, "notes": fit.notes}
            for name, fit in trained.fits.items()
        }
        write_json(self.step / "history.json", {"epochs": epochs, "steps": steps, **list(steps.values())[-1]})
        best = {"best_epoch": trained.fit.best_epoch, **best_score(trained.fit)}
        folder.mark_done(self.step, self.key, **best, seconds=round(sum(f.seconds for f in trained.fits.values()), 2))
        return tuple(f"step {name}: {note}" for name, fit in trained.fits.items() for note in fit.notes)

    def answer(self, head: MILHead, readout: Readout) -> list[BagPrediction]:
        """Ask the trained head about its slides."""
        asked: Any = head.to(self.device)
        return predict_scales(asked, self.asked, readout=readout)


def selective_job(
    run: Run,
    split: Split,
    sources: Mapping[str, PatchSource],
    method: str,
    settings: TeacherSettings,
    encoder: Encoder,
    *,
    title: str = "",
    slides: Collection[str] | None = None,
) -> ChoiceJob:
    """Return the training of a selective head on a fold, and what it is to be asked about.

    Into folds/<fold>/heads/<method>/ go head.safetensors, head.json and history.json, then done.json; and outputs.npz,
    with a key of its own. The seed is that of the teacher and of the other heads.

    Args:
        run: the run.
        split: the fold; training and validation slides alone are looked at while it is trained.
        sources: by slide id, of `scale_sources`, for all slides of the fold and all of `slides`.
        method: name of the folder, and what distinguishes it from other heads.
        settings: head (zoommil or hdmil) with options, recipe and its numbers.
        encoder: what made the features.
        title: for people; default `method`.
        slides: what it answers; default the test slides of the fold.
    """
    key = head_key(run, split, features_of(run, encoder), method, settings)
    asked = split.test if slides is None else slides
    return ChoiceJob(
        title=f"{title or method}, {split.title}",
        step=run.folder.fold(split.name) / "heads" / method,
        key=key,
        outputs_key=outputs_key(run, key, asked),
        settings=settings,
        objective=run.objective,
        seed=derive_seed(run.settings.seed, split.name, "head"),
        device=str(run.device),
        train=_slides(run, split.train, sources),
        val=_slides(run, split.val, sources),
        asked=_slides(run, asked, sources),
    )


def stored_selective_head(run: Run, split: Split, method: str) -> MultiScaleHead:
    """Return the head that a `ChoiceJob` left for a fold; eval mode, on the run's device."""
    head: Any = stored_head(run.folder.fold(split.name) / "heads" / method)
    assert isinstance(head, MultiScaleHead)
    return head.to(run.device)


def time_selective(
    run: Run, method: str, entries: Sequence[SlideEntry], encoder: Encoder, head: MultiScaleHead
) -> list[SlideCost]:
    """Answer each slide from its file, reading and encoding what the head chooses, and time it; see `time_answers`.

    No feature file is looked at. What was measured is kept in seconds.json under `method`, until slides, settings,
    machine, encoder or head are others, here with their weights: on those it depends how many patches are chosen.

    Returns:
        A cost for each slide. `patches_read` and `patches_encoded` are sums over scales, thumbnails apart; these are in
        `scales`, too, with reads, pixels, bytes and seconds of each scale.
    """
    weights = [encoder.weights_sha256, _checksum(head)]
    key = fingerprint(timing_key(run, entries, encoder), head.describe(), weights, _METHOD)

    def answer(entry: SlideEntry) -> SlideCost:
        return answer_entry(run, entry, encoder.to(run.device), head.to(run.device))

    return kept_costs(run, method, key, entries, answer)


def answer_entry(run: Run, entry: SlideEntry, encoder: Encoder, head: MultiScaleHead) -> SlideCost:
    """Answer one slide from its file, once; return what it took."""
    s = run.settings
    began, bytes_before = time.perf_counter(), io_counter()
    with entry.open() as slide:
        prepared = prepare_slide(slide, s.grid, s.tissue, s.tiles, s.threads)
        answer = answer_slide(head, live_scales(run, slide, prepared.grid, encoder, head.scales))
    ended, bytes_after = time.perf_counter(), io_counter()
    known = prepared.seconds + answer.encoding_s + answer.mil_s
    scales = {name: cost for name, cost in answer.costs.items() if name != THUMBNAIL}
    return SlideCost(
        slide_id=entry.slide_id,
        tissue_s=prepared.seconds,
        reading_s=max(0.0, ended - began - known),
        encoding_s=answer.encoding_s,
        mil_s=answer.mil_s,
        total_s=ended - began,
        patches_read=sum(cost.patches_read for cost in scales.values()),
        patches_encoded=sum(cost.patches_encoded for cost in scales.values()),
        bytes_read=None if bytes_before is None or bytes_after is None else bytes_after - bytes_before,
        scales={name: cost.as_json() for name, cost in answer.costs.items()},
    )


def _slides(run: Run, slides: Collection[str], sources: Mapping[str, PatchSource]) -> tuple[SlideSource, ...]:
    return tuple(SlideSource(slide, sources[slide], **run.truth(slide)) for slide in slides)


def _checksum(head: MultiScaleHead) -> str:
    """SHA-256 of all weights."""
    total = hashlib.sha256()
    for name, value in sorted(head.state_dict().items()):
        total.update(name.encode())
        total.update(np.ascontiguousarray(value.cpu().numpy()).tobytes())
    return total.hexdigest()
