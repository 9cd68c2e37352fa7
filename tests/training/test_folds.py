from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.errors import CohortError, ConfigError
from lrmil.training.clam_splits import read_clam_splits, write_clam_splits
from lrmil.training.folds import (
    Splits,
    final_split,
    fold_columns,
    folds_for,
    folds_from_numbers,
    folds_from_parts,
    make_folds,
    make_group_folds,
    thinned,
)
from lrmil.training.leakage import class_gaps, leakage_proof


def cohort(sizes, slides_each=2):
    """Patients of each class in `sizes`, with 1 to `slides_each` slides each: patient and label of every slide."""
    patients, labels = [], []
    for label, size in sizes.items():
        for i in range(size):
            for _ in range(1 + i % slides_each):
                patients.append(f"{label}{i:03d}")
                labels.append(label)
    return patients, labels


def test_fold_of(splits, k):
    return dict(zip(splits.table["patient_id"], splits.table[f"fold_{k}"], strict=True))


test_fold_of.__test__ = False


# Properties

SIZES = st.dictionaries(st.sampled_from("abcdefg"), st.integers(7, 40), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(3, 7), st.integers(0, 2**31), st.integers(1, 4))
def test_classes_and_patients_are_spread_to_within_one(sizes, num_folds, seed, slides_each):
    patients, labels = cohort(sizes, slides_each)
    splits = make_folds(patients, labels, num_folds=num_folds, seed=seed)
    for part in ("test", "val"):
        held = [splits.patients(k, part) for k in range(num_folds)]
        totals = [len(h) for h in held]
        assert max(totals) - min(totals) <= 1
        for label in sizes:
            counts = [sum(p.startswith(label) for p in h) for h in held]
            assert max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 25), st.sampled_from([None, "a", "b", "c"])), min_size=1, max_size=120),
    st.integers(3, 6),
    st.integers(0, 100),
)
def test_any_cohort_is_dealt_without_leakage_or_refused(slides, num_folds, seed):
    """Patients with several labels, with none, and rare classes."""
    patients, labels = [f"p{p}" for p, _ in slides], [label for _, label in slides]
    per_class = Counter(label for _, label in {s for s in slides if s[1]})
    if per_class and min(per_class.values()) < num_folds:
        with pytest.raises(CohortError, match="fewer patients than the"):
            make_folds(patients, labels, num_folds=num_folds, seed=seed)
        return
    splits = make_folds(patients, labels, num_folds=num_folds, seed=seed)
    leakage_proof(splits, patients, [f"s{i}" for i in range(len(slides))], labels)
    for patient in set(patients):
        parts = [test_fold_of(splits, k)[patient] for k in range(num_folds)]
        assert Counter(parts) == {"test": 1, "val": 1, "train": num_folds - 2}
        assert parts.index("val") == (parts.index("test") - 1) % num_folds


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.randoms())
def test_the_order_of_the_rows_does_not_matter(seed, random):
    patients, labels = cohort({"a": 11, "b": 9})
    order = list(range(len(patients)))
    random.shuffle(order)
    one = make_folds(patients, labels, seed=seed)
    other = make_folds([patients[i] for i in order], [labels[i] for i in order], seed=seed)
    pd.testing.assert_frame_equal(one.table, other.table)


# Making folds


# Groups of patients, and fewer patients


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from([None, "a", "b"])), min_size=1, max_size=60),
    st.integers(3, 6),
    st.integers(0, 100),
)
def test_groups_stay_whole_or_are_refused(patients_of, num_folds, seed):
    patients, sites = [f"p{i}" for i in range(len(patients_of))], [f"site {site}" for site, _ in patients_of]
    labels = [label for _, label in patients_of]
    if len(set(sites)) < num_folds:
        with pytest.raises(CohortError, match=f"site has {len(set(sites))} values, fewer than the {num_folds} folds"):
            make_group_folds(patients, sites, labels, num_folds=num_folds, seed=seed)
        return
    splits = make_group_folds(patients, sites, labels, num_folds=num_folds, seed=seed)
    proof = leakage_proof(splits, patients, [f"s{i}" for i in range(len(patients))], labels, groups=("site", sites))
    assert "no site is in two parts" in proof
    for k in range(num_folds):
        part_of = test_fold_of(splits, k)
        for site in set(sites):
            assert len({part_of[p] for p, own in zip(patients, sites, strict=True) if own == site}) == 1


def test_as_many_folds_as_sites_test_each_site_alone():
    sites = [f"site{i % 4}" for i in range(40)]
    splits = make_group_folds([f"p{i}" for i in range(40)], sites, ["a", "b"] * 20, num_folds=4)
    tested = [{int(p[1:]) % 4 for p in splits.patients(k, "test")} for k in range(4)]
    assert sorted(map(sorted, tested)) == [[0], [1], [2], [3]]


def test_the_proof_finds_a_site_in_two_parts():
    patients, labels = cohort({"a": 9, "b": 9}, slides_each=1)
    splits = make_folds(patients, labels, num_folds=3)
    with pytest.raises(CohortError, match="leakage: fold_0: 2 values of site are in both train and val"):
        leakage_proof(splits, patients, patients, labels, groups=("site", ["x", "y"] * 9))


@pytest.mark.parametrize("empty", [None, "", float("nan")])
def test_a_slide_without_a_group_is_refused(empty):
    with pytest.raises(CohortError, match="1 slides have nothing in column site; the first is of patient p1"):
        make_group_folds(["p0", "p1", "p2", "p3"], ["x", empty, "y", "z"], num_folds=3)


def test_a_patient_of_two_groups_is_refused():
    with pytest.raises(CohortError, match="patient p0 has 'x' and 'y' in column site"):
        make_group_folds(["p0", "p0", "p1", "p2"], ["x", "y", "z", "w"], num_folds=3)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(3, 6), st.integers(0, 100), st.lists(st.integers(2, 60), min_size=2, max_size=2, unique=True))
def test_fewer_training_patients_are_a_part_of_more(sizes, num_folds, seed, counts):
    patients, labels = cohort(sizes)
    whole = make_folds(patients, labels, num_folds=num_folds, seed=seed)
    few, more = (thinned(whole, patients, labels, train_patients=n, seed=seed) for n in sorted(counts))
    for k in range(num_folds):
        all_train, all_val = whole.patients(k, "train"), whole.patients(k, "val")
        assert few.patients(k, "test") == more.patients(k, "test") == whole.patients(k, "test")
        for part in ("train", "val"):
            assert set(few.patients(k, part)) <= set(more.patients(k, part)) <= set(whole.patients(k, part))
        for splits, n in zip((few, more), sorted(counts), strict=True):
            train, val = splits.patients(k, "train"), splits.patients(k, "val")
            assert len(train) == min(n, len(all_train))
            assert len(val) == max(1, round(min(1, n / len(all_train)) * len(all_val)))
            share = len(train) / len(all_train)
            for label in sizes:
                here = sum(p.startswith(label) for p in train)
                assert abs(here - share * sum(p.startswith(label) for p in all_train)) <= len(sizes)
                assert here or n < len(sizes)


# Validation, seeds, patients with several labels


def test_validation_is_the_fold_after_the_test():
    splits = make_folds(*cohort({"a": 10, "b": 10}))
    for k in range(5):
        assert splits.patients(k, "val") == splits.patients((k + 1) % 5, "test")
        assert len(splits.patients(k, "train")) == 12


def test_seeds_reproduce_and_differ():
    patients, labels = cohort({"a": 20, "b": 20})
    tables = [make_folds(patients, labels, seed=s).table for s in (0, 0, 1)]
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_a_patient_with_two_labels_stays_whole_and_is_dealt_by_the_rarer():
    patients, labels = cohort({"a": 40, "b": 5})
    patients += [f"b00{i}" for i in range(5)]  # every patient of the rare class also has a slide of the common one
    labels += ["a"] * 5
    splits = make_folds(patients, labels)
    for k in range(5):
        assert sum(p.startswith("b") for p in splits.patients(k, "test")) == 1


def test_secondary_labels_are_spread_too():
    """30 patients of one class, a third of whom have another one too; dealing by the first alone leaves gaps."""
    patients = [f"p{i:02d}" for i in range(30)] + [f"p{i:02d}" for i in range(10)]
    labels = ["b"] * 30 + ["a"] * 10
    for seed in range(5):
        splits = make_folds(patients, labels, seed=seed)
        assert [sum(p < "p10" for p in splits.patients(k, "test")) for k in range(5)] == [2] * 5
        assert [len(splits.patients(k, "test")) for k in range(5)] == [6] * 5


def test_slides_are_balanced_where_patients_tie():
    patients = [p for i in range(10) for p in [f"p{i}"] * (9 if i < 5 else 1)]
    slides = Counter(patients)
    for seed in range(10):
        splits = make_folds(patients, ["a"] * len(patients), seed=seed)
        assert [sum(slides[p] for p in splits.patients(k, "test")) for k in range(5)] == [10] * 5


def test_unlabelled_patients_get_a_fold_of_their_own_stratum():
    patients, labels = cohort({"a": 10})
    splits = make_folds(patients + [f"u{i}" for i in range(10)], labels + [None, np.nan, "", pd.NA, None] * 2)
    assert [sum(p.startswith("u") for p in splits.patients(k, "test")) for k in range(5)] == [2] * 5


def test_a_class_with_fewer_patients_than_folds():
    patients, labels = cohort({"a": 10, "b": 4, "c": 2}, slides_each=4)  # slides do not count, patients do
    with pytest.raises(CohortError, match=r"fewer patients than the 5 folds: 'b' has 4, 'c' has 2\. Use fewer folds"):
        make_folds(patients, labels)


def test_wrong_calls():
    with pytest.raises(ConfigError, match="at least 3"):
        make_folds(["a", "b"], ["x", "x"], num_folds=2)
    with pytest.raises(ConfigError, match="2 patients and 1 labels"):
        make_folds(["a", "b"], ["x"])
    with pytest.raises(CohortError, match="no slides to split"):
        make_folds([], [])


def test_final_split_trains_and_validates_on_everyone():
    patients, labels = cohort({"a": 13, "b": 12})
    splits = final_split(patients, labels)
    assert splits.names == ("final",)
    train, val = splits.patients("final", "train"), splits.patients("final", "val")
    assert len(val) == 5
    assert sorted(train + val) == sorted(set(patients))
    assert {p[0] for p in val} == {"a", "b"}
    proof = leakage_proof(splits, patients, [f"s{i}" for i in range(len(patients))], labels)
    assert "No part is for testing" in proof


def test_final_split_validates_a_rare_class_if_it_can():
    patients, labels = cohort({"a": 20, "b": 1, "c": 2})
    for seed in range(5):
        splits = final_split(patients, labels, seed=seed)
        assert {p[0] for p in splits.patients("final", "train")} == {"a", "b", "c"}
        assert {p[0] for p in splits.patients("final", "val")} == {"a", "c"}


# Splits


def test_part_of_every_slide():
    patients, labels = cohort({"a": 10})
    splits = make_folds(patients, labels)
    parts = splits.part_of(2, patients)
    assert parts.shape == (len(patients),)
    assert {p for p, part in zip(patients, parts, strict=True) if part == "test"} == set(
        splits.patients("fold_2", "test")
    )
    with pytest.raises(CohortError, match=r"1 patients are not in the splits: zz\."):
        splits.part_of(2, ["zz", "zz"])
    with pytest.raises(CohortError, match="no fold 'fold_9'; there are fold_0, fold_1"):
        splits.part_of("fold_9", patients)


def test_splits_file_keeps_ids_that_look_like_numbers(tmp_path):
    patients = [f"00{i}" for i in range(9)] + ["1e5", "NA", "nan", "None"]
    splits = make_folds(patients, ["a"] * 13)
    splits.write(tmp_path / "splits.csv")
    assert (tmp_path / "splits.csv").read_text().splitlines()[0] == "patient_id,fold_0,fold_1,fold_2,fold_3,fold_4"
    pd.testing.assert_frame_equal(Splits.read(tmp_path / "splits.csv").table, splits.table)


def test_splits_file_with_a_misspelt_part(tmp_path):
    (tmp_path / "splits.csv").write_text("patient_id,fold_0\np1,train\np2,tets\n")
    with pytest.raises(CohortError, match="fold_0 of patient p2 is 'tets'"):
        Splits.read(tmp_path / "splits.csv")
    with pytest.raises(CohortError, match="no such file"):
        Splits.read(tmp_path / "none.csv")


# Folds that the cohort brings


def test_fold_numbers_of_the_cohort():
    splits = folds_from_numbers(["p0", "p1", "p2", "p0", "x"], ["0", "1.0", 2, 0, None])
    assert splits.num_folds == 3
    assert splits.patients(0, "test") == ["p0"]
    assert splits.patients(0, "val") == ["p1"]
    assert splits.patients(0, "train") == ["p2"]
    assert splits.part_of(0, ["x"]).tolist() == [""]


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([0, 1, 2, 1], "patient p0 has '0' and '1' in column fold"),
        ([0, 1, 3, 0], "fold column holds 0, 1, 3"),
        ([0, 1, 1, 0], "at least three"),
        ([1, 2, 3, 1], "Folds are numbered 0, 1, 2"),
        ([0, 1, "x", 0], "fold of patient p2 is 'x'"),
        ([0, 1, -2, 0], "fold of patient p2 is '-2'"),
        ([None] * 4, "holds no number"),
    ],
)
def test_impossible_fold_numbers(folds, message):
    with pytest.raises(CohortError, match=message):
        folds_from_numbers(["p0", "p1", "p2", "p0"], folds)


def test_parts_of_the_cohort_in_numerical_order():
    columns = {f"fold_{k}": ["train"] * 3 for k in range(1, 12)}
    columns["fold_10"] = ["Test", "training", "valid"]
    columns["fold_2"] = ["", "train", "test"]
    splits = folds_from_parts(["p0", "p1", "p2"], columns)
    assert splits.names == tuple(f"fold_{k}" for k in range(11))
    assert splits.part_of(9, ["p0", "p1", "p2"]).tolist() == ["test", "train", "val"]
    assert splits.part_of(1, ["p0", "p1", "p2"]).tolist() == ["", "train", "test"]
    with pytest.raises(CohortError, match="patient p0 has 'train' and 'test' in column fold_1"):
        folds_from_parts(["p0", "p0"], {"fold_1": ["train", "test"]})
    with pytest.raises(CohortError, match="fold_1 of patient p0 is 'hold-out'"):
        folds_from_parts(["p0"], {"fold_1": ["hold-out"]})


def test_a_cohort_that_brings_folds_is_obeyed():
    patients, labels = cohort({"a": 6, "b": 6}, slides_each=1)
    table = pd.DataFrame({"patient_id": patients, "label": labels})
    pd.testing.assert_frame_equal(folds_for(table, num_folds=3).table, make_folds(patients, labels, num_folds=3).table)
    numbered = table.assign(fold=[i % 4 for i in range(12)])
    assert folds_for(numbered, num_folds=3).num_folds == 4
    parts = table.assign(fold_1=["train"] * 8 + ["val"] * 2 + ["test"] * 2, fold_x="?")
    assert fold_columns(parts) == ["fold_1"]
    assert folds_for(parts).patients(0, "test") == ["b004", "b005"]


# The proof


def proven(sizes=None, **changes):
    patients, labels = cohort(sizes or {"a": 10, "b": 5})
    slides = [f"s{i:02d}" for i in range(len(patients))]
    splits = make_folds(patients, labels)
    call = {"splits": splits, "patients": patients, "slides": slides, "labels": labels} | changes
    return leakage_proof(**call)


def test_the_proof_counts_every_part():
    text = proven()
    # 10 + 5 patients with 1 or 2 slides: 15 + 7 slides
    assert text.splitlines()[0] == "Split of 15 patients with 22 slides:"
    assert text.count("3 patients") == 10
    assert text.count("9 patients") == 5
    assert (
        text.count(
            "shared by train and val 0 patients, 0 slides; train and test 0 patients, 0 slides; "
            "val and test 0 patients, 0 slides"
        )
        == 5
    )
    tested = [line for line in text.splitlines() if line.strip().startswith("test")]
    assert sum(int(line.split()[3]) for line in tested) == 22
    assert "Each of 15 patients is tested exactly once. " in text
    assert text.endswith("No patient and no slide is in two parts of a fold.")
    assert "(a " in tested[0]
    assert "b " in tested[0]


def test_a_patient_that_stands_twice_is_leakage():
    patients, labels = cohort({"a": 10, "b": 5})
    splits = make_folds(patients, labels)
    twice = splits.table[splits.table["patient_id"] == "a003"].assign(fold_0="train", fold_1="test")
    broken = Splits(pd.concat([splits.table, twice]))
    with pytest.raises(CohortError, match=r"leakage: fold_\d: 1 patients are in both \w+ and \w+: a003"):
        proven(splits=broken)


def test_one_slide_under_two_patients_is_leakage():
    patients, labels = cohort({"a": 10, "b": 5})
    splits = make_folds(patients, labels)
    train, test = splits.patients(0, "train")[0], splits.patients(0, "test")[0]
    slides = [f"s{i:02d}" for i in range(len(patients))]
    slides[patients.index(test)] = slides[patients.index(train)]
    with pytest.raises(CohortError, match="leakage: fold_0: 1 slides are in both train and test: s"):
        proven(slides=slides)


def test_a_slide_whose_patient_is_in_no_split():
    patients, _ = cohort({"a": 10, "b": 5})
    with pytest.raises(CohortError, match="1 patients are in no split: zz"):
        proven(patients=["zz", *patients[1:]])


def test_a_patient_tested_never_or_twice():
    columns = {"fold_1": ["train", "val", "test"], "fold_2": ["train", "val", "test"]}
    splits = folds_from_parts(["p0", "p1", "p2"], columns)
    call = (splits, ["p0", "p1", "p2"], ["s0", "s1", "s2"])
    with pytest.raises(CohortError, match=r"not tested exactly once: p0 \(0 times\), p1 \(0 times\), p2 \(2 times\)"):
        leakage_proof(*call)
    assert "Tested once: 0 patients; never: 2; more often: 1." in leakage_proof(*call, tested_once=False)


def test_missing_classes_are_warned_about():
    columns = {"fold_1": ["train", "train", "val", "test"]}
    splits = folds_from_parts(["p0", "p1", "p2", "p3"], columns)
    labels = ["a", "b", "b", None]
    assert class_gaps(splits, ["p0", "p1", "p2", "p3"], labels) == [
        "fold_0: no val slide of class 'a'.",
        "fold_0: no test slide of class 'a'.",
        "fold_0: no test slide of class 'b'.",
    ]
    text = leakage_proof(splits, ["p0", "p1", "p2", "p3"], list("wxyz"), labels, tested_once=False)
    assert "WARNING: fold_0: no val slide of class 'a'." in text
    assert class_gaps(make_folds(*cohort({"a": 5, "b": 5})), *cohort({"a": 5, "b": 5})) == []


# CLAM


def test_clam_round_trip(tmp_path):
    patients, labels = cohort({"a": 9, "b": 8}, slides_each=3)
    slides = [f"{i:03d}" for i in range(len(patients))]
    splits = make_folds(patients, labels)
    write_clam_splits(splits, tmp_path / "clam", patients, slides)
    first = pd.read_csv(tmp_path / "clam" / "splits_0.csv", dtype=str)
    assert list(first.columns) == ["train", "val", "test"]
    assert first["test"].notna().sum() == np.sum(splits.part_of(0, patients) == "test")
    again = read_clam_splits(tmp_path / "clam", dict(zip(slides, patients, strict=True)))
    pd.testing.assert_frame_equal(again.table, splits.table)


def test_clam_files_as_clam_writes_them(tmp_path):
    patient_of = {f"s{i}": f"p{i // 2}" for i in range(8)}
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,s0,s4,s6\n1,s1,s5,\n2,s2,,\n")
    (tmp_path / "splits_10.csv").write_text(",train,val,test\n0,s0,,\n")
    (tmp_path / "splits_2.csv").write_text(",train,val,test\n0,s0,s6,\n")
    (tmp_path / "splits_0_bool.csv").write_text(",train,val,test\ns0,True,False,False\n")
    splits = read_clam_splits(tmp_path, patient_of)
    assert splits.names == ("fold_0", "fold_1", "fold_2")
    assert splits.part_of(0, ["p0", "p1", "p2", "p3"]).tolist() == ["train", "train", "val", "test"]
    assert splits.part_of(1, ["p0", "p3", "p1"]).tolist() == ["train", "val", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train,val,test\ns0,s1,\n", "slide s1 is in val, another slide of patient p0 in train"),
        ("train,val,test\ns0,s9,\n", "1 slides are not in the cohort: s9"),
        ("train,test\ns0,s2\n", "no column val"),
    ],
)
def test_clam_files_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "splits_0.csv").write_text(text)
    with pytest.raises(CohortError, match=message):
        read_clam_splits(tmp_path, {"s0": "p0", "s1": "p0", "s2": "p1"})


def test_clam_folder_without_splits_and_unknown_slides_ignored(tmp_path):
    with pytest.raises(CohortError, match=r"no splits_0\.csv"):
        read_clam_splits(tmp_path, {})
    (tmp_path / "splits_0.csv").write_text("train,val,test\ns0,s9,\n")
    splits = read_clam_splits(tmp_path, {"s0": "p0"}, ignore_unknown=True)
    assert splits.patients(0, "train") == ["p0"]
