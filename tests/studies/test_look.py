"""Real and simulated fields are shown as the probes see them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.studies.conftest import PATCH_PX, TINY

from lrmil.encoders.settings import EncoderSettings
from lrmil.errors import ConfigError
from lrmil.studies.fields import Field
from lrmil.studies.look import look_figure, write_look
from lrmil.studies.settings import FieldSettings, ProbeSettings


def field(name: str, colour: int) -> Field:
    pixels = np.full((80, 80, 3), colour, np.uint8)
    pixels[:4, :4] = 0
    return Field(name, name, pixels, np.zeros(0), np.zeros(0), {})


def test_each_study_is_shown_at_both_scales() -> None:
    figure = look_figure([("real", [field("a", 200), field("b", 90)]), ("simulated", [field("c", 150)])], 64, 4)
    shown = [ax.get_images()[0].get_array() for ax in figure.axes if ax.get_images()]
    assert sorted(image.shape[0] for image in shown) == [16, 16, 16, 64, 64, 64]
    low = next(image for image in shown if image.shape[0] == 16)
    assert (low[0, 0] == 0).all()
    assert (low[1:, 1:] == low[5, 5]).all(), "the mean of 4 x 4 pixels, nothing else"


@pytest.fixture
def study(tissue: Path, tmp_path: Path) -> ProbeSettings:
    fields = FieldSettings(crchisto=str(tissue))
    return ProbeSettings(fields=fields, encoder=EncoderSettings(name=TINY), patch_px=PATCH_PX, out=str(tmp_path))


def test_studies_of_different_ratios_are_not_shown_together(study: ProbeSettings, tmp_path: Path) -> None:
    other = study.model_copy(update={"ratio": 2})
    with pytest.raises(ConfigError, match="different ratios"):
        write_look([("a", study), ("b", other)], 2, tmp_path / "look")


def test_it_draws_the_fields_of_a_study(study: ProbeSettings, tmp_path: Path) -> None:
    assert write_look([("a", study)], 3, tmp_path / "look").stat().st_size > 5000
