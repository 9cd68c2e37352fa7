"""Ridge probes, R2 with intervals, recovery."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from lrmil.errors import TrainingError
from lrmil.evaluation.recovery import share_of_gap
from lrmil.studies.ridge import ALPHAS, ridge_probe
from lrmil.studies.summary import Drawn, group_losses, recovery, results_table, retrieval_table


def _answers(noise: dict[str, float], seeds: int = 2, folds: int = 3) -> pd.DataFrame:
    """Five groups of four regions in each fold; the smaller an arm's noise, the better it is."""
    rng = np.random.default_rng(0)
    rows = []
    for fold in range(folds):
        truth = rng.standard_normal(20)
        for arm, level in noise.items():
            for seed in range(seeds):
                said = truth + level * rng.standard_normal(20)
                for view in range(20):
                    row = {"arm": arm, "embedding": "cls", "target": "share", "fold": fold, "seed": seed}
                    group = f"g{fold}_{view // 4}"
                    rows.append(
                        row | {"group": group, "view": 20 * fold + view, "truth": truth[view], "predicted": said[view]}
                    )
    return pd.DataFrame(rows)


def _row(table: pd.DataFrame, arm: str) -> pd.Series:
    return table[table["arm"] == arm].iloc[0]


def test_r2_is_that_of_all_test_regions_averaged_over_seeds() -> None:
    answers = _answers({"lr": 0.7})
    wanted = np.mean([r2_score(c["truth"], c["predicted"]) for _, c in answers.groupby("seed")])
    row = _row(results_table(answers, ["share"], 300), "lr")
    assert row["r2"] == pytest.approx(wanted)
    assert row["r2_low"] < row["r2"] < row["r2_high"]
    assert (row["cells"], row["seeds"]) == (6, 2)


def test_unknown_truths_are_left_out() -> None:
    answers = _answers({"lr": 0.7}, seeds=1, folds=1)
    answers.loc[answers["view"] < 8, "truth"] = np.nan
    known = answers[answers["view"] >= 8]
    row = _row(results_table(answers, ["share"], 100), "lr")
    assert row["r2"] == pytest.approx(r2_score(known["truth"], known["predicted"]))
    assert group_losses(answers[answers["view"] < 8], 1.0) is None


def test_gains_are_paired_and_recovery_is_their_ratio_unclipped() -> None:
    table = results_table(_answers({"hr": 0.3, "lr": 0.9, "better": 0.1, "worse": 1.5}), ["share"], 400, "better")
    hr, lr, better, worse = (_row(table, arm) for arm in ("hr", "lr", "better", "worse"))
    assert better["gain"] == pytest.approx(better["r2"] - lr["r2"])
    assert better["gap"] == pytest.approx(hr["r2"] - lr["r2"])
    assert better["recovery"] == pytest.approx(better["gain"] / better["gap"])
    assert better["recovery"] > 1, "better than 20x is said so"
    assert worse["recovery"] < 0
    assert better["gain_low"] > 0 > worse["gain_high"]
    assert worse["below_primary"] == pytest.approx(better["r2"] - worse["r2"])
    # Paired: the difference is surer than two independent values would be.
    assert worse["below_primary_high"] > worse["below_primary"] > worse["below_primary_low"] > 0


def test_an_arm_is_no_better_than_itself() -> None:
    answers = _answers({"lr": 0.9})
    table = results_table(pd.concat([answers, answers.assign(arm="same")]), ["share"], 200)
    same = _row(table, "same")
    assert (same["gain"], same["gain_low"], same["gain_high"]) == (0, 0, 0)


def test_nothing_is_recovered_where_20x_is_not_better_with_confidence() -> None:
    table = results_table(_answers({"hr": 0.9, "lr": 0.8, "own": 0.1}), ["share"], 400)
    own = _row(table, "own")
    assert own["gap_low"] <= 0
    assert np.isnan(own["recovery"])
    drawn = np.linspace(-1, 1, 100)
    assert recovery(Drawn(1.0, drawn, 9), Drawn(0.0, drawn * 0, 9), Drawn(0.5, drawn, 9)) is None


def test_what_is_recovered_follows_the_rule_of_the_comparisons() -> None:
    """A resample whose gap is negative must not turn what is above both into what is below both."""
    gap = np.where(np.arange(1000) < 20, -0.01, np.linspace(0.5, 1.5, 1000))
    student, lr, hr = (Drawn(float(v.mean()), v, 30) for v in (gap * 0 + 0.8, gap * 0 + 0.1, gap + 0.1))
    found = recovery(student, lr, hr)
    assert found is not None
    wanted = share_of_gap((hr - lr).interval(), *((own.value, own.resamples) for own in (student, hr, lr)))
    assert found == wanted
    assert 0 < found.low < found.value < found.high
    assert found.patients == 30


def test_only_shared_cells_are_compared() -> None:
    """A partial study must not compare an arm's easy folds with another's hard ones."""
    answers = _answers({"hr": 0.3, "lr": 0.9, "own": 0.9})
    partial = answers[(answers["arm"] != "own") | (answers["fold"] == 1)]
    own = _row(results_table(partial, ["share"], 200), "own")
    one = partial[(partial["fold"] == 1) & (partial["arm"] != "hr")]
    error = ((one["truth"] - one["predicted"]) ** 2).groupby(one["arm"]).mean()
    variance = partial.drop_duplicates("view")["truth"].var(ddof=0)
    assert own["cells"] == 2
    assert own["gain"] == pytest.approx((error["lr"] - error["own"]) / variance)


def test_retrieval_is_the_mean_over_regions() -> None:
    rows = [("own", 1, 0, 0, "a", v, 1.0) for v in range(9)] + [("own", 1, 0, 0, "b", 9, 0.0)]
    frame = pd.DataFrame(rows, columns=["arm", "layer", "fold", "seed", "group", "view", "share"])
    row = retrieval_table(frame, 200, 1).iloc[0]
    assert row["retrieval"] == pytest.approx(0.9)
    assert row["last"]


def test_a_ridge_probe_learns_what_is_linear_and_chooses_alpha_inside() -> None:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((120, 30)) * np.logspace(-3, 3, 30)
    truth = (features / np.logspace(-3, 3, 30))[:, :3].sum(axis=1)
    groups = np.repeat(np.arange(30), 4).astype(str)
    told = truth[:80].copy()
    told[::7] = np.nan
    answer = ridge_probe(features[:80], told, groups[:80], features[80:])
    assert r2_score(truth[80:], answer.predicted) > 0.95, "whatever the scale of the features"
    noise = ridge_probe(features[:80], rng.standard_normal(80), groups[:80], features[80:])
    assert noise.alpha > answer.alpha
    with pytest.raises(TrainingError, match="two groups"):
        ridge_probe(features[:4], truth[:4], groups[:4], features[80:])


def test_the_ridge_probe_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    features, groups = rng.standard_normal((60, 90)), np.repeat(np.arange(12), 5).astype(str)
    truth = features[:, 0] + 3 + rng.standard_normal(60)
    scale = StandardScaler().fit(features[:50])
    inner = list(GroupKFold(5).split(features[:50], truth[:50], groups[:50]))
    theirs = RidgeCV(ALPHAS, cv=inner, scoring="neg_mean_squared_error").fit(scale.transform(features[:50]), truth[:50])
    ours = ridge_probe(features[:50], truth[:50], groups[:50], features[50:])
    assert ours.alpha == pytest.approx(theirs.alpha_)
    np.testing.assert_allclose(ours.predicted, theirs.predict(scale.transform(features[50:])), rtol=1e-8)
