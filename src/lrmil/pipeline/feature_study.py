"""A cohort that brings features and no slides: what `lrmil compare` needs of a study, made from the feature files.

Nothing is known here of encoder, scale or cost, so only heads that take one bag of features can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lrmil.bags import Bag, read_foreign_bag
from lrmil.cohorts.table import Cohort
from lrmil.errors import BagError, CohortError, ConfigError, SlideError
from lrmil.files import remove_leftovers
from lrmil.pipeline.checks import require_own_folder
from lrmil.pipeline.config import RunSettings, save_config
from lrmil.pipeline.context import Run, SlideEntry, Split
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.splits import make_splits
from lrmil.pipeline.stale import discard_stale_results


class FeatureRun(Run):
    """A run whose entries are feature files in place of slides: their names, sizes and times stand in all keys."""

    @cached_property
    def _entries(self) -> dict[str, SlideEntry]:
        table = self.cohort.labelled()
        mpps = table["mpp"] if "mpp" in table else [None] * len(table)
        return {
            str(slide_id): SlideEntry(str(slide_id), Path(path), None if mpp is None or mpp != mpp else float(mpp))
            for slide_id, path, mpp in zip(table["slide_id"], table["features"], mpps, strict=True)
        }


@dataclass
class FeatureStudy:
    """One run over given features, and its folds. What a `Study` is to slides."""

    run: FeatureRun
    coordinates: bool
    """Whether a head wants to know where the instances lie"""
    folds: list[Split] = field(default_factory=list)
    proof: str = ""
    main: FeatureStudy | None = None
    """The study that this one is a variant of"""

    @classmethod
    def begin(
        cls, settings: RunSettings, cohort: Cohort, reporter: Reporter, *, coordinates: bool = False
    ) -> FeatureStudy:
        """Check all that can be checked without reading features, and write what the output folder begins with.

        Raises:
            CohortError: a labelled slide has no feature file.
            ConfigError: the output folder holds what no run wrote.
        """
        reporter.line(cohort.summary())
        labelled = cohort.labelled()
        without = list(labelled.loc[labelled["features"].isna(), "slide_id"])
        if without:
            raise CohortError(
                f"{cohort.source}: {len(without)} slides have no feature file (first: {without[0]}).",
                fix="Complete the features column, or name the folder of the files as cohort.features_dir.",
            )
        run = FeatureRun.of(settings, cohort, reporter)
        require_own_folder(run.folder)
        remove_leftovers(run.folder.root)
        discard_stale_results(run)
        save_config(settings, run.folder.config)
        cohort.write(run.folder.cohort)
        run.folder.write_failures([])
        reporter.event("run started", out=str(run.folder.root), slides=len(labelled))
        return cls(run, coordinates)

    def variant(self, name: str, settings: RunSettings) -> FeatureStudy:
        """Return a study on the same features and folds, with other settings of training or another seed."""
        run = replace(self.run, settings=settings, folder=self.run.folder.variant(name))
        return FeatureStudy(run, self.coordinates, self.folds, self.proof, main=self)

    @cached_property
    def hr_bags(self) -> dict[str, Bag]:
        """Features of all slides whose file can be read; the others are noted as failures.

        Raises:
            ConfigError: none can be read.
            BagError: two files differ in width.
        """
        if self.main is not None:
            return self.main.hr_bags
        run = self.run
        entries = run.entries()
        bags: dict[str, Bag] = {}
        with (
            run.reporter.stage("read", f"Reading features of {len(entries)} slides"),
            run.reporter.task("read", len(entries)) as progress,
        ):
            for entry in entries:
                try:
                    bags[entry.slide_id] = self._read(entry)
                except BagError as error:
                    slide = entry.slide_id
                    run.fail(slide, "read", SlideError(error.message, slide=slide, fix=error.fix))
                progress.advance(note=entry.slide_id)
        if not bags:
            raise ConfigError(
                f"none of the {len(entries)} feature files can be used; the first: {run.failures[0].message}",
                fix=f"Every reason is in {run.folder.failures}.",
            )
        first = next(iter(bags))
        for slide_id, bag in bags.items():
            if bag.width != bags[first].width:
                raise BagError(
                    f"{run.entry(slide_id).path}: features of width {bag.width}, those of {first} have width "
                    f"{bags[first].width}.",
                    fix="All features of a cohort must come from one encoder.",
                )
        return bags

    @property
    def slides(self) -> list[str]:
        """Ids of the slides whose features could be read."""
        return list(self.hr_bags)

    @property
    def features(self) -> dict[str, Any]:
        """What is known of the features beside their files."""
        return {"features": "given", "width": self.width, "coordinates": self.coordinates}

    @property
    def width(self) -> int:
        """Width of the features."""
        return next(iter(self.hr_bags.values())).width

    def prepare(self) -> None:
        """Read all features and make the folds."""
        self.folds, self.proof = make_splits(self.run, self.slides)

    def _read(self, entry: SlideEntry) -> Bag:
        bag = read_foreign_bag(entry.path, mpp_l0=entry.mpp, coordinates=self.coordinates)
        if bag.num_patches == 0 or bag.width == 0:
            raise BagError(
                f"{entry.path}: it holds {bag.num_patches} patches with features of width {bag.width}.",
                fix="Leave the slide out, or give a file of features.",
            )
        return bag
