"""HDMIL: the original's numbers, both training steps, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrmil.errors import CheckpointError, HeadError
from lrmil.mil import RecordedSource, StoredScales, create_head, head_cards, load_original
from lrmil.mil.dmin import DMIN, gumbel_mask, keep_rate, pool_dynamic, pool_kept
from lrmil.mil.hdmil import HDMIL, LIPN_RECIPE, dmin_step, lipn_step, lipn_targets
from lrmil.mil.smooth_top1_svm import smooth_top1_svm


def _thumbnails(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def _bag(count: int, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def _source(count: int) -> StoredScales:
    return StoredScales({"high": _bag(count)}, thumbnails=_thumbnails(count))


def _dmin(classes: int = 3, **options: Any) -> DMIN:
    torch.manual_seed(3)
    head: DMIN = create_head("dmin", 6, classes, embed_dim=10, hidden_dim=5, degree=3, **options)
    return head


def _head(classes: int = 3, **options: Any) -> HDMIL:
    """A head that keeps about a fifth of the patches for each class."""
    torch.manual_seed(3)
    head: HDMIL = create_head("hdmil", 6, classes, embed_dim=10, hidden_dim=5, degree=3, **options)
    with torch.no_grad():
        head.lipn.classifier.weight.normal_(0, 30)
        head.lipn.classifier.bias -= head.lipn.eval()(_thumbnails(40)).quantile(0.8, dim=0)
    return head.train()


def _original(file: Any) -> dict[str, Tensor]:
    return {k: torch.tensor(v) for part in ("param/", "param_lipn/") for k, v in file.under(part).items()}


@pytest.mark.parametrize("case", ["N37", "N200"])
def test_it_matches_the_original(golden: Callable[[str], Any], case: str) -> None:
    file = golden("hdmil_D768_C2")
    head = load_original("hdmil", _original(file), k_sample=16)
    bag, thumbnails = (torch.tensor(file[f"in/{case}/{k}"])[0] for k in ("bag", "lowres_uint8_NHWC"))
    label = torch.tensor(file[f"in/{case}/label"])
    answer = head.dmin(bag)
    scores = answer.class_attention_logits
    file.expect(f"out/{case}/attention_logits", scores[None], atol=1e-5)
    # Sums of 6,656 terms of either sign: both programs are off the value in double precision by about 1e-5.
    file.expect(f"out/{case}/eval_logits(DMIN)", answer.logits[None], atol=5e-5)
    file.expect(f"out/{case}/eval_mask", lipn_targets(head.dmin, bag)[2][None])
    file.expect(f"loss/{case}/eval_ce", F.cross_entropy(answer.logits[None], label))
    record = RecordedSource(StoredScales({"high": bag}, thumbnails=thumbnails))
    out = head(record)
    record.check(out.selected)
    file.expect(f"out/{case}/lipn_logits", out.logits[None], atol=5e-5)
    losses = lipn_step(head.lipn, head.dmin, thumbnails, bag).losses
    file.expect(f"loss/{case}/lipn_distill_total", sum(losses.values()))


@pytest.mark.parametrize("case", ["N37", "N200"])
def test_its_training_path_matches_the_original(golden: Callable[[str], Any], case: str) -> None:
    file = golden("hdmil_D768_C2")
    dmin = load_original("dmin", {k: torch.tensor(v) for k, v in file.under("param/").items()}, k_sample=16, dropout=0)
    dmin.train()
    bag, label = torch.tensor(file[f"in/{case}/bag"])[0], torch.tensor(file[f"in/{case}/label"])
    noise = tuple(torch.tensor(file[f"in/{case}/gumbel_exp{i}"])[0] for i in (1, 2))
    answer = dmin(bag)
    embedded, scores = answer.hidden, answer.class_attention_logits
    mask = gumbel_mask(scores, noise)
    kept = pool_dynamic(scores, mask, embedded)
    file.expect(f"out/{case}/train_logits", answer.logits[None], atol=5e-5)
    file.expect(f"out/{case}/train_A", torch.softmax(scores, 0).T[None])
    file.expect(f"out/{case}/train_M", answer.bag_feature[None], atol=1e-5)
    file.expect(f"out/{case}/train_select_M", kept[None], atol=1e-5)
    file.expect(f"out/{case}/train_select_logits", dmin.classify(kept)[None], atol=5e-5)
    file.expect(f"out/{case}/train_mask_rate", keep_rate(mask))
    losses = dmin.losses(embedded, scores, answer.bag_feature, answer.logits, int(label), noise)
    bag_loss = F.cross_entropy(answer.logits[None], label)
    file.expect(f"loss/{case}/train_bag_ce", bag_loss)
    file.expect(f"loss/{case}/train_instance", losses["instance"][None] / 0.3)
    file.expect(f"loss/{case}/train_kl", losses["kept_logits"] / 0.5)
    file.expect(f"loss/{case}/train_feature_mse", losses["kept_features"] / 0.5)
    file.expect(f"loss/{case}/train_rate_mse(ratio0.6)", losses["keep_rate"] / 2)
    file.expect(f"loss/{case}/train_total", 0.7 * bag_loss + sum(losses.values()))


def test_its_checkpoints_come_together_or_by_name_and_say_what_does_not_fit(golden: Callable[[str], Any]) -> None:
    file = golden("hdmil_D768_C2")
    parts = {
        "dmin": {f"module.{k}": torch.tensor(v) for k, v in file.under("param/").items()},
        "lipn": {k: torch.tensor(v) for k, v in file.under("param_lipn/").items()},
    }
    wanted = load_original("hdmil", _original(file)).state_dict()
    got = load_original("hdmil", parts).state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[k], got[k]) for k in wanted)
    assert load_original("hdmil", parts).describe()["degree"] == 12
    with pytest.raises(CheckpointError, match=r"not a checkpoint of 'hdmil'.*extractor.classifier.weight"):
        load_original("hdmil", parts["dmin"])
    parts["lipn"].pop("extractor.conv.block.1.running_var")
    parts["lipn"]["extractor.classifier.weight"] = torch.zeros(3, 64)
    with pytest.raises(CheckpointError, match=r"classifier.weight: shape \(3, 64\).*conv.block.1.running_var: missing"):
        load_original("hdmil", parts)


# The paths of DMIN


def test_the_dynamic_path_normalises_over_instances_and_classes_the_eval_path_within_each_class() -> None:
    scores, mask, embedded = _bag(7, 3), (_bag(7, 3).roll(1) > 0).float(), _bag(7, 4)
    weights = torch.exp(scores) * mask
    torch.testing.assert_close(pool_dynamic(scores, mask, embedded), (weights / weights.sum()).T @ embedded)
    torch.testing.assert_close(pool_kept(scores, mask, embedded), (weights / weights.sum(0)).T @ embedded)


def test_extreme_scores_do_not_overflow() -> None:
    scores, embedded = torch.tensor([[500.0, -500.0], [400.0, -600.0]]), _bag(2, 4)
    mask = torch.ones(2, 2)
    assert torch.isfinite(pool_dynamic(scores, mask, embedded)).all()
    torch.testing.assert_close(pool_kept(scores, mask, embedded), embedded[[0, 0]])


def test_the_mask_is_hard_noisy_and_passes_the_gradient_of_its_sigmoid() -> None:
    scores = _bag(50, 2).requires_grad_()
    noise = tuple(torch.rand(50, 2, generator=torch.Generator().manual_seed(i)) + 0.01 for i in (1, 2))
    mask = gumbel_mask(scores, noise)
    soft = torch.sigmoid((scores.detach() - noise[0].log() + noise[1].log()) / 0.7)
    assert torch.equal(mask, (soft > 0.5).float())
    mask.sum().backward()
    torch.testing.assert_close(scores.grad, soft * (1 - soft) / 0.7)
    torch.manual_seed(0)
    drawn = gumbel_mask(torch.full((20_000, 1), 0.4).double())
    # The difference of two Gumbel draws is logistic, so that an instance is kept with probability sigmoid(s).
    assert float(drawn.mean()) == pytest.approx(torch.sigmoid(torch.tensor(0.4)).item(), abs=0.015)


def test_every_class_counts_in_the_rate_unless_the_originals_fault_is_asked_for() -> None:
    mask = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    assert keep_rate(mask).item() == 0.75
    assert keep_rate(mask, "first_two").item() == 0.5
    keep_rate(mask).backward()
    assert torch.equal(mask.grad, torch.full((4, 3), 0.25))  # type: ignore[arg-type]
    assert _dmin().options.rate_classes == "all"


def test_a_class_that_keeps_nothing_has_a_constant_logit() -> None:
    dmin = _dmin().eval()
    with torch.no_grad():
        dmin.attention_w.bias[1] = -1e3
    constant = dmin.classifiers[1](torch.zeros(10))[0]
    for count in (1, 5, 30):
        out = dmin(_bag(count))
        assert out.logits[1] == constant
        assert torch.equal(out.bag_feature[1], torch.zeros(10))
    out.logits.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in dmin.parameters())


def test_nothing_kept_in_training_is_no_division_by_zero() -> None:
    scores, embedded = _bag(6, 3).requires_grad_(), _bag(6, 4)
    mask = gumbel_mask(scores, (torch.full((6, 3), 1e9), torch.full((6, 3), 1e-9)))
    assert mask.sum() == 0
    kept = pool_dynamic(scores, mask, embedded)
    assert torch.equal(kept, torch.zeros(3, 4))
    kept.sum().backward()
    assert torch.isfinite(scores.grad).all()  # type: ignore[arg-type]


def test_step_one_gives_the_vanilla_logits_and_all_terms() -> None:
    dmin = _dmin(dropout=0.0)
    out = dmin_step(dmin, _bag(12), torch.tensor(1))
    embedded, scores = dmin.attend(_bag(12))
    torch.testing.assert_close(out.logits, dmin.classify(torch.softmax(scores, 0).T @ embedded))
    assert set(out.losses) == {"instance", "kept_logits", "kept_features", "keep_rate"}
    assert dmin.bag_loss_weight == 0.7
    dmin.total_loss(out, F.cross_entropy(out.logits[None], torch.tensor([1]))).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in dmin.parameters())
    assert dmin(_bag(12)).losses == {}
    assert dmin.eval()(_bag(12), label=torch.tensor(1)).losses == {}
    assert torch.equal(dmin(_bag(12)).logits, dmin(_bag(12), label=torch.tensor(2)).logits)


def test_the_targets_of_the_divergence_and_of_the_features_get_gradients_too() -> None:
    dmin = _dmin(dropout=0.0)
    embedded, scores = (t.detach() for t in dmin.attend(_bag(12)))
    pooled = (torch.softmax(scores, 0).T @ embedded).requires_grad_()
    logits = dmin.classify(pooled)
    losses = dmin.losses(embedded, scores, pooled, logits, 0)
    for term in ("kept_logits", "kept_features"):
        (grad,) = torch.autograd.grad(losses[term], pooled, retain_graph=True)
        assert float(grad.abs().max()) > 0, term


@pytest.mark.parametrize("count", [1, 3, 5, 40])
@pytest.mark.parametrize("subtyping", [True, False])
def test_the_instance_loss_is_that_of_clam_with_k_clamped(count: int, subtyping: bool) -> None:
    dmin, label, k = _dmin(k_sample=4, subtyping=subtyping), 1, min(4, count)
    embedded, scores = _bag(count, 10), _bag(count, 3)
    wanted = torch.tensor(0.0)
    for c in range(3):
        order = scores[:, c].argsort(descending=True)
        if c == label:
            rows = torch.cat([order[:k], order[-k:]])
            wanted += smooth_top1_svm(dmin.instance_classifiers[c](embedded[rows]), torch.tensor([1] * k + [0] * k))
        elif subtyping:
            wanted += smooth_top1_svm(dmin.instance_classifiers[c](embedded[order[:k]]), torch.zeros(k).long())
    wanted = wanted / 3 if subtyping else wanted
    torch.testing.assert_close(dmin.instance_loss(embedded, scores, label), wanted)


def test_gradients_of_the_vanilla_path_are_those_of_finite_differences() -> None:
    dmin = _dmin(dropout=0.0).double().train()
    bag = _bag(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda b: dmin.score(b, label=None, coords=None).logits, (bag,))


def test_one_class_is_refused_and_so_is_a_label_out_of_range() -> None:
    with pytest.raises(HeadError, match="two at least"):
        _dmin(1)
    with pytest.raises(HeadError, match="numbered 0 to 2"):
        _dmin()(_bag(4), label=torch.tensor(3))


# The deployed head


def test_only_the_union_of_the_chosen_patches_is_read_and_it_is_enough() -> None:
    head, record = _head().eval(), RecordedSource(_source(40))
    out = head(record)
    record.check(out.selected)
    chosen = out.selection_logits["high"] > 0
    assert torch.equal(out.selected["high"], chosen.any(1).nonzero()[:, 0])
    assert 0 < len(out.selected["high"]) < 40
    assert not torch.equal(chosen[:, 0], chosen[:, 1])  # classes choose for themselves
    embedded, scores = head.dmin.attend(_bag(40))
    torch.testing.assert_close(out.logits, head.dmin.classify(pool_kept(scores, chosen, embedded)))
    assert record.thumbnail_reads == 1


def test_a_patch_counts_only_for_the_classes_that_chose_it() -> None:
    head, source = _head().eval(), _source(40)
    out = head(source)
    chosen = out.selection_logits["high"][out.selected["high"]] > 0
    embedded, scores = head.dmin.attend(_bag(40)[out.selected["high"]])
    for c in range(3):
        own = torch.softmax(scores[chosen[:, c], c], 0) @ embedded[chosen[:, c]]
        torch.testing.assert_close(out.bag_feature[c], own)


def test_choosing_nothing_reads_nothing_and_gives_constants() -> None:
    head, record = _head().eval(), RecordedSource(_source(40))
    with torch.no_grad():
        head.lipn.classifier.bias.fill_(-1e4)
    out = head(record)
    record.check(out.selected)
    assert record.fetched == {}
    torch.testing.assert_close(out.logits, head.dmin.classify(torch.zeros(3, 10)))


def test_the_steps_follow_one_another_each_training_its_own_part() -> None:
    head, source, label = _head(), _source(40), torch.tensor(1)
    with pytest.raises(HeadError, match=r"two steps.*begin_step\('dmin'\)"):
        head(source, label=label)
    for step, weight in (("dmin", 0.7), ("lipn", 0.0)):
        head.begin_step(step)
        assert head.train().bag_loss_weight == weight
        head.zero_grad(set_to_none=True)
        out = head(source, label=label)
        head.total_loss(out, F.cross_entropy(out.logits[None], label[None])).backward()
        trained = {name.split(".")[0] for name, p in head.named_parameters() if p.grad is not None}
        assert trained == {step}
        assert out.selected["high"].tolist() == list(range(40))
    assert head.steps == ("dmin", "lipn")


def test_step_one_is_validated_on_all_patches_step_two_as_deployed() -> None:
    head, source = _head(), _source(40)
    deployed = head.eval()(source)
    head.begin_step("dmin")
    out = head.eval()(source)
    assert torch.equal(out.logits, head.dmin(_bag(40)).logits)
    assert len(out.selected["high"]) == 40
    head.begin_step("lipn")
    assert torch.equal(head.eval()(source).logits, deployed.logits)


def test_targets_are_made_without_dropout_unless_the_originals_way_is_asked_for() -> None:
    head, bag = _head(dropout=0.5), _bag(300)
    head.begin_step("lipn")
    head.train()
    quiet = [lipn_targets(head.dmin, bag)[2] for _ in range(2)]
    noisy = [lipn_targets(head.dmin, bag, "train")[2] for _ in range(2)]
    assert torch.equal(*quiet)
    assert torch.equal(quiet[0], (head.dmin.eval()(bag).class_attention_logits > 0).float())
    assert not torch.equal(*noisy)
    assert not head.dmin.training
    lipn_targets(head.dmin, bag, "train")
    assert not head.dmin.training  # its mode is put back
    assert head.options.target_mode == "eval"

    seen: list[bool] = []
    head.dmin.attention_w.register_forward_hook(lambda *_: seen.append(head.dmin.training))
    for mode in ("eval", "train"):
        lipn_step(head.lipn, head.dmin, _thumbnails(300), bag, mode)  # type: ignore[arg-type]
    assert seen == [False, True]


def test_the_second_step_does_not_touch_the_first() -> None:
    head, source = _head(), _source(40)
    before = {k: v.clone() for k, v in head.dmin.state_dict().items()}
    head.begin_step("lipn")
    optimiser = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        out = head.train()(source, label=torch.tensor(0))
        torch.stack(list(out.losses.values())).sum().backward()
        optimiser.step()
    assert all(torch.equal(before[k], v) for k, v in head.dmin.state_dict().items())


def test_the_recipes_are_the_published_ones() -> None:
    recipe = next(card.recipe for card in head_cards() if card.name == "hdmil")
    assert recipe is not None
    assert (recipe.learning_rate, recipe.weight_decay, recipe.epochs, recipe.patience) == (3e-4, 1e-5, 200, 20)
    assert (recipe.first_epoch, recipe.balanced_sampler, recipe.select_by) == (50, True, "loss")
    assert HDMIL.step_recipes == {"dmin": recipe, "lipn": LIPN_RECIPE}
    assert (LIPN_RECIPE.learning_rate, LIPN_RECIPE.weight_decay, LIPN_RECIPE.patience) == (1e-4, 1e-5, 5)
    assert LIPN_RECIPE.first_epoch == 0


def test_a_slide_of_many_patches_is_predicted() -> None:
    with torch.inference_mode():
        out = _head().eval()(_source(20_000))
    assert torch.isfinite(out.logits).all()
