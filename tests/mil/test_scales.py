"""The seam between slides and heads that choose their patches."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrmil.errors import HeadError
from lrmil.mil import HeadCard, MultiScaleHead, MultiScaleOutput, RecordedSource, StoredScales, create_head, head_cards
from lrmil.mil.scales import PatchSource, children_of, nested_slots, ratio_between

MANY = [card for card in head_cards() if card.scales == "many"]


def _slide(low: int = 5, r2: int = 4, r3: int = 16, width: int = 6, seed: int = 0) -> StoredScales:
    g = torch.Generator().manual_seed(seed)
    sizes = {"low": low, "mid": low * r2, "high": low * r3}
    thumbnails = torch.randint(0, 256, (low * r3, 16, 16, 3), generator=g, dtype=torch.uint8)
    return StoredScales({s: torch.randn(n, width, generator=g) for s, n in sizes.items()}, thumbnails=thumbnails)


class LazySource:
    """A slide whose patches are encoded when they are asked for: row by row, from a seed."""

    def __init__(self, stored: StoredScales) -> None:
        self._stored = stored
        self.encoded = 0

    @property
    def counts(self) -> Any:
        return self._stored.counts

    def fetch(self, scale: str, rows: Tensor) -> Tensor:
        self.encoded += len(rows)
        return torch.stack([self._stored.fetch(scale, row[None])[0] for row in rows])

    def thumbnails(self) -> Tensor:
        return self._stored.thumbnails().clone()


def _head(name: str, **options: Any) -> MultiScaleHead:
    torch.manual_seed(1)
    head = create_head(name, 6, 3, **options).eval()
    if name == "hdmil":  # fresh weights say yes to all patches or to none
        with torch.no_grad():
            head.lipn.classifier.weight.normal_(0, 30)
            scores = head.lipn(_slide().thumbnails())
            head.lipn.classifier.bias -= scores.quantile(0.8, dim=0)
    return head


@pytest.mark.parametrize("card", MANY, ids=lambda card: card.name)
def test_a_head_reads_what_it_selects_once_and_nothing_else(card: HeadCard) -> None:
    options = {"k": 2} if card.name == "zoommil" else {}
    head, stored = _head(card.name, **options), _slide()
    record = RecordedSource(stored)
    out = head(record)
    record.check(out.selected)
    assert set(record.fetched) == set(head.scales)
    assert 0 < len(record.fetched["high"]) < stored.counts["high"]
    assert record.thumbnail_reads == int(head.needs_thumbnails)
    for scale, rows in out.selected.items():
        assert rows.tolist() == sorted(record.fetched[scale])


@pytest.mark.parametrize("card", MANY, ids=lambda card: card.name)
def test_lazy_and_stored_features_give_identical_logits(card: HeadCard) -> None:
    head, stored = _head(card.name), _slide()
    lazy = LazySource(stored)
    with torch.inference_mode():
        assert torch.equal(head(lazy).logits, head(stored).logits)
    assert lazy.encoded < sum(stored.counts.values())


@pytest.mark.parametrize("card", MANY, ids=lambda card: card.name)
@pytest.mark.parametrize("low", [1, 2, 40])
@pytest.mark.parametrize("classes", [2, 7])
def test_every_head_answers_slides_of_any_size(card: HeadCard, low: int, classes: int) -> None:
    head = create_head(card.name, 6, classes).eval()
    out = head(_slide(low), label=torch.tensor(1))
    assert out.logits.shape == (classes,)
    assert torch.isfinite(out.logits).all()
    assert card.citation
    assert card.licence_note
    assert card.recipe is not None
    again = create_head(**json.loads(json.dumps(head.describe()))).eval()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(_slide(low)).logits, out.logits)


class Cheat(MultiScaleHead):
    """Does not tell the truth about what it reads."""

    scales = ("high",)

    def __init__(self, read: list[int], tell: list[int]) -> None:
        super().__init__(6, 2, self.Options())
        self.read, self.tell = torch.tensor(read), torch.tensor(tell)

    def score(self, source: PatchSource, *, label: Tensor | None) -> MultiScaleOutput:
        features = torch.cat([source.fetch("high", row[None]) for row in self.read])
        return MultiScaleOutput(features.sum(0)[:2], selected={"high": self.tell})


@pytest.mark.parametrize(
    ("read", "tell", "message"),
    [
        ([1, 2, 3], [1, 2], "1 rows of scale 'high' were read but not selected, first row 3"),
        ([1, 2], [1, 2, 5], "1 rows of scale 'high' were selected but not read, first row 5"),
        ([1, 2, 1], [1, 2], "1 rows of scale 'high' were read twice, first row 1"),
        ([1, 2], [1, 2, 2], "1 rows of scale 'high' were selected twice, first row 2"),
    ],
)
def test_a_head_that_reads_more_less_or_twice_is_found_out(read: list[int], tell: list[int], message: str) -> None:
    record = RecordedSource(_slide())
    out = Cheat(read, tell)(record)
    with pytest.raises(HeadError, match=message):
        record.check(out.selected)


def test_an_honest_head_is_not() -> None:
    record = RecordedSource(_slide())
    record.check(Cheat([3, 1], [1, 3])(record).selected)
    with pytest.raises(HeadError, match="scale 'mid' were selected but not read"):
        record.check({"high": torch.tensor([1, 3]), "mid": torch.tensor([0])})


def test_stored_features_are_checked() -> None:
    low, mid = torch.zeros(3, 4), torch.zeros(12, 4)
    parents = torch.arange(3).repeat_interleave(4)
    assert StoredScales({"low": low, "mid": mid}, parents={"mid": parents}).counts == {"low": 3, "mid": 12}
    for wrong in (parents.roll(1), parents.flip(0), torch.arange(12) % 3, parents[:-1], parents.clamp(max=1)):
        with pytest.raises(HeadError, match=r"'mid' are not listed parent by parent, 4 each.*keep all children"):
            StoredScales({"low": low, "mid": mid}, parents={"mid": wrong})
    with pytest.raises(HeadError, match="parents are given for"):
        StoredScales({"low": low, "mid": mid}, parents={"low": parents})
    with pytest.raises(HeadError, match=r"scale 'mid' has 11 patches for 3 of 'low'.*Keep all children"):
        StoredScales({"low": low, "mid": mid[:11]})
    with pytest.raises(HeadError, match="scale 'low' has 3 patches for 12 of 'mid'"):
        StoredScales({"mid": mid, "low": low})
    with pytest.raises(HeadError, match="no patches at scale 'low'"):
        StoredScales({"low": low[:0]})
    with pytest.raises(HeadError, match=r"'low' holds torch.uint8 of shape \(3, 4\)"):
        StoredScales({"low": low.byte()})
    with pytest.raises(HeadError, match="at least one scale"):
        StoredScales({})
    with pytest.raises(HeadError, match="stored without thumbnails"):
        StoredScales({"low": low}).thumbnails()


@pytest.mark.parametrize(
    ("thumbnails", "message"),
    [
        (torch.zeros(3, 16, 16, 3), "torch.float32"),
        (torch.zeros(3, 3, 16, 16, dtype=torch.uint8)[..., :2], r"\(3, 3, 16, 2\)"),
        (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), "2 thumbnails for 3 patches"),
        (torch.zeros(3, 0, 16, 3, dtype=torch.uint8), "not uint8"),
    ],
)
def test_thumbnails_are_checked(thumbnails: Tensor, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        StoredScales({"high": torch.zeros(3, 4)}, thumbnails=thumbnails)


def test_stored_features_travel_to_another_process() -> None:
    images = torch.randint(0, 256, (8, 3, 3, 3), dtype=torch.uint8)
    sent = StoredScales({"low": torch.randn(2, 5).half(), "high": torch.randn(8, 5)}, thumbnails=images)
    arrived = pickle.loads(pickle.dumps(sent))
    assert arrived.counts == sent.counts
    for scale, count in sent.counts.items():
        assert torch.equal(arrived.fetch(scale, torch.arange(count)), sent.fetch(scale, torch.arange(count)))
    assert torch.equal(arrived.thumbnails(), images)


def test_a_fourth_channel_of_thumbnails_is_dropped() -> None:
    four = torch.randint(0, 256, (3, 8, 8, 4), dtype=torch.uint8)
    assert torch.equal(StoredScales({"high": torch.zeros(3, 4)}, thumbnails=four).thumbnails(), four[..., :3])


def test_half_precision_is_kept_until_rows_are_fetched_and_all_rows_are_not_copied() -> None:
    stored = StoredScales({"low": torch.arange(8.0).reshape(4, 2).half()})
    got = stored.fetch("low", torch.tensor([2, 0]))
    assert got.dtype == torch.float32
    assert got.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    whole = torch.randn(4, 2)
    assert StoredScales({"low": whole}).fetch("low", torch.arange(4)).data_ptr() == whole.data_ptr()
    assert torch.equal(StoredScales({"low": whole}).fetch("low", torch.arange(4).flip(0)), whole.flip(0))


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.integers(0, 50), min_size=1, max_size=9), r2=st.integers(1, 5), r3=st.integers(1, 5))
def test_children_of_children_are_the_grandchildren(rows: list[int], r2: int, r3: int) -> None:
    parents = torch.tensor(rows)
    assert torch.equal(children_of(children_of(parents, r2), r3), children_of(parents, r2 * r3))
    assert torch.equal(children_of(parents, r2) // r2, parents.repeat_interleave(r2))
    counts = {"low": 60, "high": 60 * r2}
    assert ratio_between(counts, "low", "high") == r2


@settings(deadline=None, max_examples=20)
@given(mid=st.integers(1, 4), step=st.integers(1, 4))
def test_nested_slots_group_fine_patches_by_the_middle_one_that_holds_them(mid: int, step: int) -> None:
    high = mid * step
    slots = nested_slots(mid, high)
    assert sorted(slots.tolist()) == list(range(high**2))
    row, col = slots // high, slots % high
    holder = (row // step) * mid + col // step
    assert torch.equal(holder, torch.arange(mid**2).repeat_interleave(step**2))


def test_sides_that_do_not_nest_are_refused() -> None:
    with pytest.raises(HeadError, match="4 fine patches along a region do not divide into 3"):
        nested_slots(3, 4)


def test_slides_that_a_head_cannot_take() -> None:
    head = _head("zoommil")
    with pytest.raises(
        HeadError, match=r"no patches at 'mid'.*has \{'low': 5, 'high': 80\}.*reads 'low', 'mid', 'high'"
    ):
        head(StoredScales({"low": torch.zeros(5, 6), "high": torch.zeros(80, 6)}))
    with pytest.raises(HeadError, match=r"'low' gave shape \(5, 7\).*\(n, 6\).*another encoder"):
        head(_slide(width=7))
    with pytest.raises(HeadError, match=r"'zoommil' chooses its patches from low and mid and high.*PatchSource"):
        head(torch.zeros(5, 6))
    with pytest.raises(HeadError, match="thumbnails for 80"):
        _head("hdmil")(_Fewer(_slide()))
    with pytest.raises(HeadError, match=r"no training step 'x'.*Choose one of: dmin, lipn"):
        _head("hdmil").begin_step("x")


class _Fewer(LazySource):
    def thumbnails(self) -> Tensor:
        return super().thumbnails()[:-1]


@pytest.mark.parametrize(("scale", "row"), [("low", 3), ("mid", 9), ("high", 33)])
def test_the_scale_and_row_of_a_value_that_is_not_finite_are_named(scale: str, row: int) -> None:
    stored = _slide(3)
    stored.fetch(scale, torch.arange(stored.counts[scale]))[row % stored.counts[scale], 2] = float("nan")
    row %= stored.counts[scale]
    with pytest.raises(HeadError, match=f"1 of .* patches of scale '{scale}' hold NaN or infinity, first row {row}"):
        _head("zoommil")(stored)


def test_large_finite_values_are_not_taken_for_infinity() -> None:
    head = create_head("zoommil", 6, 2).eval()
    huge = StoredScales({s: torch.full((n, 6), 3e38) for s, n in (("low", 1), ("mid", 4), ("high", 16))})
    head(huge)  # the sum of the features overflows, the features do not
