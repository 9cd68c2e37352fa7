"""The same study under several training seeds: on the same folds, each with everything trained anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

from lrmil.pipeline.feature_study import FeatureStudy
from lrmil.pipeline.study import Study


@overload
def under_each_seed(study: Study) -> Iterator[Study]: ...
@overload
def under_each_seed(study: FeatureStudy) -> Iterator[FeatureStudy]: ...
def under_each_seed(study: Study | FeatureStudy) -> Iterator[Study | FeatureStudy]:
    """Yield a study under each seed of `compare.seeds`, or only as it is; under its own seed it is itself.

    Every comparison uses the same folders for a seed, so that none trains again what another has trained.
    """
    s = study.run.settings
    for seed in s.compare.seeds or [s.seed]:
        yield study if seed == s.seed else study.variant(f"seed_{seed}", s.model_copy(update={"seed": seed}))
