from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrmil.cohorts.table import load_cohort
from lrmil.errors import CohortError
from lrmil.training.folds import folds_for


@pytest.fixture
def folder(tmp_path):
    """A folder with empty slide files s1.svs .. s9.svs and feature files s1.h5 .. s9.h5."""
    for name in ("slides", "features"):
        (tmp_path / name).mkdir()
    for i in range(1, 10):
        (tmp_path / "slides" / f"s{i}.svs").touch()
        (tmp_path / "features" / f"s{i}.h5").touch()
    return tmp_path


def save(folder: Path, text: str, name: str = "cohort.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n", encoding="utf-8")
    return path


OURS = """
    slide_id,patient_id,label,path,mpp,site
    001,0a,LUSC,slides/s1.svs,0.25,A
    002,0a,LUSC,slides/s2.svs,,A
    003,0b,LUAD,slides/s3.svs,0.5,B
    004,0c,,slides/s4.svs,0.5,
"""


# Our own table


def test_canonical_table(folder):
    cohort = load_cohort(save(folder, OURS))
    table = cohort.table
    assert list(table.columns) == ["slide_id", "patient_id", "label", "path", "mpp", "site"]
    assert table["slide_id"].tolist() == ["001", "002", "003", "004"]  # leading zeros kept
    assert table["patient_id"].tolist() == ["0a", "0a", "0b", "0c"]
    assert table["path"][0] == str(folder / "slides" / "s1.svs")
    np.testing.assert_array_equal(table["mpp"], [0.25, np.nan, 0.5, 0.5])
    assert cohort.classes == ("LUAD", "LUSC")
    assert cohort.targets().tolist() == [1, 1, 0, -1]
    assert cohort.labelled()["slide_id"].tolist() == ["001", "002", "003"]
    assert (cohort.label_of("003"), cohort.patient_of("002")) == (0, "0a")
    assert cohort.name == folder.name


def test_an_unlabelled_slide_is_counted(folder):
    cohort = load_cohort(save(folder, OURS))
    assert cohort.warnings == ("1 slides have no label and are left out of training (rows 5)",)
    assert "label: LUAD 1 (1), LUSC 2 (1); slides (patients) of each class; 1 without" in cohort.summary()
    with pytest.raises(CohortError, match="slide 004 has no label"):
        cohort.label_of("004")
    with pytest.raises(CohortError, match="no slide '9'"):
        cohort.patient_of("9")


def test_where_the_program_is_started_does_not_matter(folder, monkeypatch):
    save(folder, OURS)
    monkeypatch.chdir(folder)
    assert load_cohort("cohort.csv").table["path"][0] == str(folder / "slides" / "s1.svs")
    monkeypatch.chdir("/")
    relative = os.path.relpath(folder / "cohort.csv", "/")
    assert load_cohort(relative).table["path"][0] == str(folder / "slides" / "s1.svs")


def test_what_is_written_is_read_again(folder):
    cohort = load_cohort(save(folder, OURS.replace("site", "note, with comma").replace("note, with comma", "note")))
    elsewhere = folder / "run" / "cohort.csv"
    cohort.write(elsewhere)
    again = load_cohort(elsewhere)
    pd.testing.assert_frame_equal(again.table, cohort.table)
    assert again.tasks == cohort.tasks


CELL = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=8
).filter(lambda t: t.lower() not in ("nan", "na", "n/a", "#n/a"))
ID = CELL.filter(lambda t: t not in (".", "..") and not set(t) & set("/\\"))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(ID, min_size=2, max_size=8, unique=True), patients=st.lists(CELL, min_size=8, max_size=8))
def test_any_text_survives_as_an_id(tmp_path, ids, patients):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["slide_id", "patient_id", "label"])
    writer.writerows((s, p, i % 2) for i, (s, p) in enumerate(zip(ids, patients, strict=False)))
    path = tmp_path / "any.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    cohort = load_cohort(path, check_files=False)
    assert cohort.table["slide_id"].tolist() == ids
    assert cohort.table["patient_id"].tolist() == patients[: len(ids)]
    cohort.write(tmp_path / "out" / "cohort.csv")
    pd.testing.assert_frame_equal(load_cohort(tmp_path / "out" / "cohort.csv", check_files=False).table, cohort.table)


# Tables of other programs


def test_clam_table_with_slides_found_by_name(folder):
    (folder / "slides" / "deep").mkdir()
    (folder / "slides" / "s1.svs").rename(folder / "slides" / "deep" / "s1.svs")
    path = save(folder, "case_id,slide_id,label\np1,s1,tumor\np1,s2,tumor\np2,s3.svs,normal")
    cohort = load_cohort(path, slides_dir=folder / "slides")
    assert cohort.table["path"].tolist() == [str(folder / "slides" / n) for n in ("deep/s1.svs", "s2.svs", "s3.svs")]
    assert cohort.table["patient_id"].tolist() == ["p1", "p1", "p2"]


def test_stamp_tables(folder):
    clini = save(folder, "PATIENT,isMSIH,AGE\n01,MSIH,50\n02,nonMSIH,60\n03,nonMSIH,70", "clini.csv")
    slide = save(folder, "PATIENT,FILENAME\n01,s1.h5\n01,s2.h5\n02,s3.h5\n99,s4.h5", "slide.csv")
    cohort = load_cohort(clini, task="isMSIH", slide_table=slide, features_dir=folder / "features")
    table = cohort.table
    assert table["slide_id"].tolist() == ["s1", "s2", "s3"]
    assert table["patient_id"].tolist() == ["01", "01", "02"]
    assert table["isMSIH"].tolist() == ["MSIH", "MSIH", "nonMSIH"]
    assert table["features"][0] == str(folder / "features" / "s1.h5")
    assert "path" not in table
    assert table["AGE"].tolist() == ["50", "50", "60"]
    assert any("1 slides of slide.csv are of patients not in clini.csv (99)" in w for w in cohort.warnings)
    assert any("1 patients of clini.csv have no slide (03)" in w for w in cohort.warnings)


def test_stamp_patient_twice_or_tables_of_different_cohorts(folder):
    slide = save(folder, "PATIENT,FILENAME\n01,s1.h5", "slide.csv")
    clini = save(folder, "PATIENT,y\n01,a\n02,b\n01,b", "clini.csv")
    with pytest.raises(CohortError, match=r"clini.csv: row 4: patient 01 stands twice"):
        load_cohort(clini, task="y", slide_table=slide)
    clini = save(folder, "PATIENT,y\n1,a\n2,b", "clini.csv")
    with pytest.raises(CohortError, match=r"no slide of a patient of clini\.csv"):
        load_cohort(clini, task="y", slide_table=slide)


def test_lrmil_table_of_patients(folder):
    for name in ("TCGA-AB-0001-01Z-00-DX1.svs", "TCGA-AB-0001-01Z-00-DX2.svs", "TCGA-AB-00012.svs"):
        (folder / "slides" / name).touch()
    path = save(
        folder,
        """P_ID,status,event,fold_1,fold_2
           TCGA-AB-0001,alive,0,train,test
           TCGA-AB-00012,dead,1,val,train
           TCGA-AB-0003,dead,1,test,val""",
    )
    cohort = load_cohort(path, task="status", slides_dir=folder / "slides")
    table = cohort.table
    assert table["slide_id"].tolist() == [
        "TCGA-AB-0001-01Z-00-DX1",
        "TCGA-AB-0001-01Z-00-DX2",
        "TCGA-AB-00012",  # not a slide of ...0001, whose id is the beginning of its name
    ]
    assert table["patient_id"].tolist() == ["TCGA-AB-0001", "TCGA-AB-0001", "TCGA-AB-00012"]
    assert table["event"].tolist() == [0.0, 0.0, 1.0]
    assert folds_for(table, "status").part_of(1, ["TCGA-AB-0001"]).tolist() == ["test"]
    assert any("1 patients have no file" in w and "TCGA-AB-0003" in w for w in cohort.warnings)
    assert any("9 files in" in w and "are of no patient" in w for w in cohort.warnings)


def test_a_table_of_patients_needs_a_folder(folder):
    path = save(folder, "P_ID,label\np1,a\np2,b")
    with pytest.raises(CohortError, match=r"it lists patients, and no column names their slides.*slides_dir"):
        load_cohort(path)
    with pytest.raises(CohortError, match="no file name begins with a patient's id"):
        load_cohort(path, slides_dir=folder / "slides")


def test_the_longest_patient_id_owns_a_file_and_p1_does_not_get_those_of_p12(folder):
    for name in ("P1_2_A.svs", "P1-B.svs", "P12.svs"):
        (folder / "slides" / name).touch()
    path = save(folder, "patient,label\nP1,a\nP1_2,b\ns1,b\ns2,a")
    table = load_cohort(path, slides_dir=folder / "slides").table.set_index("slide_id")
    assert table["patient_id"]["P1_2_A"] == "P1_2"
    assert table["label"]["P1_2_A"] == "b"
    assert table["patient_id"]["P1-B"] == "P1"
    assert "P12" not in table.index


def test_slide2vec_table(folder):
    path = save(
        folder, "sample_id,image_path,mask_path,spacing_at_level_0\ns1,slides/s1.svs,,0.25\ns2,slides/s2.svs,,0.5"
    )
    cohort = load_cohort(path, task=None, strict=True)
    assert cohort.table["mpp"].tolist() == [0.25, 0.5]
    assert cohort.table["path"][1] == str(folder / "slides" / "s2.svs")
    assert cohort.table["patient_id"].tolist() == ["s1", "s2"]
    assert cohort.tasks == ()


def test_trident_list(folder):
    path = save(folder, "wsi,mpp\ns1.svs,0.25\ns2.svs,0.5")
    cohort = load_cohort(path, task=None, slides_dir=folder / "slides")
    assert cohort.table["slide_id"].tolist() == ["s1", "s2"]
    assert cohort.table["path"][0] == str(folder / "slides" / "s1.svs")


def test_slideflow_annotations(folder):
    path = save(folder, "patient,slide,subtype\np1,s1,A\np2,s2,B")
    cohort = load_cohort(path, task="subtype", slides_dir=folder / "slides")
    assert cohort.table["path"][1] == str(folder / "slides" / "s2.svs")


def test_a_canonical_column_wins_over_an_alias(folder):
    cohort = load_cohort(save(folder, "slide_id,slide,patient_id,label\ns1,x,p1,a\ns2,y,p2,b"), check_files=False)
    assert cohort.table["slide_id"].tolist() == ["s1", "s2"]
    assert cohort.table["slide"].tolist() == ["x", "y"]


def test_a_task_may_be_called_like_a_column_of_ours(folder):
    cohort = load_cohort(save(folder, "slide_id,patient_id,site\ns1,p1,a\ns2,p2,b"), task="site", check_files=False)
    assert cohort.classes == ("a", "b")
    assert list(cohort.table.columns) == ["slide_id", "patient_id", "site"]
    assert cohort.targets().tolist() == [0, 1]
    assert "site: a 1 (1), b 1 (1)" in cohort.summary()


def test_overall_survival_as_a_label_beside_its_time(folder):
    path = save(folder, "slide_id,patient_id,time,event\ns1,p1,10.5,0\ns2,p2,3,1")
    cohort = load_cohort(path, task="event", check_files=False)
    assert cohort.targets().tolist() == [0, 1]
    assert cohort.table["time"].tolist() == [10.5, 3.0]
    cohort.write(folder / "again.csv")
    assert load_cohort(folder / "again.csv", task="event", check_files=False).table.equals(cohort.table)


# Labels


def labelled(folder, labels, **options):
    rows = "\n".join(f"s{i},p{i},{label}" for i, label in enumerate(labels))
    return load_cohort(save(folder, "slide_id,patient_id,label\n" + rows), check_files=False, **options)


def test_label_order_is_sorted_and_numbers_sort_as_numbers(folder):
    assert labelled(folder, ["b", "a", "C"]).classes == ("C", "a", "b")
    assert labelled(folder, ["10", "9", "2"]).classes == ("2", "9", "10")
    assert labelled(folder, ["9", "10", "x"]).classes == ("9", "10", "x")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(["tumor", "normal", "3+4", "10", "2"]))
def test_label_order_does_not_depend_on_the_rows(tmp_path, labels):
    assert labelled(tmp_path, labels).classes == ("2", "10", "3+4", "normal", "tumor")


def test_label_order_given(folder):
    cohort = labelled(folder, ["normal", "tumor"], classes=["tumor", "normal"])
    assert cohort.classes == ("tumor", "normal")
    assert cohort.targets().tolist() == [1, 0]
    assert labelled(folder, ["0", "1"], classes=[1, 0]).targets().tolist() == [1, 0]  # as YAML gives them


def test_a_label_that_is_not_among_the_classes(folder):
    with pytest.raises(CohortError, match=r"row 4: label 'c' is not among the classes \['a', 'b'\] \(1 such rows\)"):
        labelled(folder, ["a", "b", "c"], classes=["a", "b"])
    with pytest.raises(CohortError, match="at least two labels, each once"):
        labelled(folder, ["a", "b"], classes=["a", "a"])


@pytest.mark.parametrize("pair", [("LUAD", "luad"), ("1", "1.0"), ("non MSI", "non-MSI")])
def test_two_spellings_of_one_label(folder, pair):
    with pytest.raises(CohortError, match="they would be two classes"):
        labelled(folder, [*pair, "other"])
    assert len(labelled(folder, [*pair, "other"], classes=[*pair, "other"]).classes) == 3


@pytest.mark.parametrize(("labels", "message"), [(["a", "a"], "only the label 'a'"), (["", "NA"], "no label")])
def test_one_class_or_none(folder, labels, message):
    with pytest.raises(CohortError, match=message):
        labelled(folder, labels)


@pytest.mark.parametrize("empty", ["", "NaN", "NA", "n/a", "#N/A", "  "])
def test_marks_for_nothing_are_no_label(folder, empty):
    assert labelled(folder, ["a", "b", empty]).targets().tolist() == [0, 1, -1]


@pytest.mark.parametrize("label", ["None", "null", "negative"])
def test_words_that_may_be_classes_are_labels(folder, label):
    assert label in labelled(folder, ["a", label]).classes


TWO_LABELS = "slide_id,patient_id,label\ns1,p1,a\ns2,p1,b\ns3,p2,a\ns4,p3,b"


def test_one_patient_with_two_labels_is_legal_and_reported(folder):
    cohort = load_cohort(save(folder, TWO_LABELS), check_files=False)
    assert cohort.warnings == (
        "1 patients have slides of more than one label (p1: a, b); a patient's slides stay together",
    )


def test_one_patient_with_two_labels_is_an_error_at_patient_level(folder):
    with pytest.raises(CohortError, match=r"1 patients have more than one label \(p1: a, b\); p1 stands in rows 2, 3"):
        load_cohort(save(folder, TWO_LABELS), check_files=False, label_level="patient")


def test_several_tasks_share_a_table(folder):
    path = save(folder, "slide_id,patient_id,subtype,Grade\ns1,p1,A,1\ns2,p2,B,2\ns3,p3,,3")
    cohort = load_cohort(path, task=["subtype", "grade"], check_files=False)
    assert [t.name for t in cohort.tasks] == ["subtype", "grade"]
    assert cohort.task("grade").classes == ("1", "2", "3")
    assert cohort.targets("grade").tolist() == [0, 1, 2]
    assert len(cohort.labelled()) == 2
    with pytest.raises(CohortError, match=r"no task 'stage' \(there is subtype, grade\)"):
        cohort.task("stage")


def test_a_class_with_fewer_patients_than_folds(folder):
    text = "slide_id,patient_id,label\n" + "\n".join(f"s{i},p{i // 2},{'a' if i < 12 else 'b'}" for i in range(16))
    with pytest.raises(CohortError, match=r"column label: fewer patients than the 5 folds: 'b' has 2"):
        load_cohort(save(folder, text), check_files=False, num_folds=5)
    load_cohort(save(folder, text), check_files=False, num_folds=None)
    brings = "\n".join(line + (",fold" if i == 0 else f",{i // 2 % 3}") for i, line in enumerate(text.splitlines()))
    load_cohort(save(folder, brings), check_files=False, num_folds=5)


# Bad input


def test_missing_files_are_all_listed_up_to_ten(folder):
    rows = "\n".join(f"s{i},p{i},{'ab'[i % 2]},slides/s{i}.svs" for i in range(1, 24))
    with pytest.raises(CohortError) as caught:
        load_cohort(save(folder, "slide_id,patient_id,label,path\n" + rows))
    message = str(caught.value)
    assert "14 files of 23 slides are missing" in message
    assert f"row 11, s10: path {folder / 'slides' / 's10.svs'}" in message
    assert message.count("\n  row ") == 10
    assert "and 4 more" in message


def test_missing_files_may_be_dropped(folder):
    rows = "s1,p1,a,slides/s1.svs\ns0,p0,a,slides/s0.svs\ns2,p2,b,slides/s2.svs"
    path = save(folder, "slide_id,patient_id,label,path\n" + rows)
    cohort = load_cohort(path, missing="drop")
    assert cohort.table["slide_id"].tolist() == ["s1", "s2"]
    assert any("1 slides are left out because files are missing (s0)" in w for w in cohort.warnings)
    path = save(folder, "slide_id,patient_id,label,path\ns0,p0,a,slides/s0.svs\nsx,p1,b,slides/sx.svs")
    with pytest.raises(CohortError, match="2 files of 2 slides are missing"):
        load_cohort(path, missing="drop")


def test_dropping_a_slide_keeps_the_others_of_its_patient(folder):
    for name in ("P1-a", "P1-b", "P2-a"):
        (folder / "slides" / f"{name}.svs").touch()
    for name in ("P1-a", "P2-a"):
        (folder / "features" / f"{name}.h5").touch()
    path = save(folder, "P_ID,label\nP1,a\nP2,b")
    cohort = load_cohort(path, slides_dir=folder / "slides", features_dir=folder / "features", missing="drop")
    assert cohort.table["slide_id"].tolist() == ["P1-a", "P2-a"]
    assert any("1 slides are left out because files are missing (P1-b)" in w for w in cohort.warnings)


@pytest.mark.parametrize("name", ["../s1", "a/s1", "..", "/tmp/s1", "a\\s1"])
def test_an_id_that_would_write_elsewhere(folder, name):
    path = save(folder, f"slide_id,patient_id,label\n{name},p1,a\ns2,p2,b")
    with pytest.raises(CohortError, match=r"row 2, column slide_id: .* cannot be the name of a file"):
        load_cohort(path, check_files=False)


def test_a_slide_that_is_not_in_the_folder(folder):
    path = save(folder, "slide_id,patient_id,label\ns1,p1,a\nzz,p2,b")
    with pytest.raises(CohortError, match=r"row 3, zz: nothing by that name in .*slides"):
        load_cohort(path, slides_dir=folder / "slides")
    with pytest.raises(CohortError, match="no such folder of slides"):
        load_cohort(path, slides_dir=folder / "nowhere")


def test_two_files_by_one_name(folder):
    (folder / "slides" / "s1.tif").touch()
    with pytest.raises(CohortError, match="slide s1: 2 files have that name"):
        load_cohort(save(folder, "slide_id,patient_id,label\ns1,p1,a\ns2,p2,b"), slides_dir=folder / "slides")


def test_a_row_without_a_file(folder):
    path = save(folder, "slide_id,patient_id,label,path\ns1,p1,a,slides/s1.svs\ns2,p2,b,")
    with pytest.raises(CohortError, match="row 3, s2: an empty path"):
        load_cohort(path)


def test_nothing_says_where_the_slides_are(folder):
    path = save(folder, "slide_id,patient_id,label\ns1,p1,a\ns2,p2,b")
    with pytest.raises(CohortError, match="nothing says where the slides are"):
        load_cohort(path)
    assert "path" not in load_cohort(path, check_files=False).table


def test_duplicate_slides(folder):
    path = save(folder, "slide_id,patient_id,label\ns1,p1,a\ns2,p2,b\ns1,p1,a\n")
    with pytest.raises(
        CohortError, match=r"1 values of slide_id stand more than once: 's1' in rows 2, 4\. Keep one row"
    ):
        load_cohort(path, check_files=False)


def test_one_file_under_two_ids(folder):
    path = save(folder, "slide,patient,label,path\na,p1,a,slides/s1.svs\nb,p2,b,./slides/../slides/s1.svs")
    with pytest.raises(CohortError, match=r"1 values of path stand more than once: '.*s1.svs' in rows 2, 3"):
        load_cohort(path)


def test_no_label_column_lists_what_there_is(folder):
    path = save(folder, "slide_id,patient_id,lable\ns1,p1,a")
    with pytest.raises(
        CohortError, match=r"no label column 'label' \(there is slide_id, patient_id, lable\)\. Did you mean 'lable'"
    ):
        load_cohort(path)
    with pytest.raises(CohortError, match="Set `task` to one of them"):
        load_cohort(path, task="subtype")


def test_no_patient_column(folder):
    path = save(folder, "slide_id,label\ns1,a\ns2,b")
    with pytest.raises(CohortError, match=r"no column says whose slide it is.*never both train and test"):
        load_cohort(path, check_files=False)


def test_empty_ids_name_their_rows(folder):
    with pytest.raises(CohortError, match=r"case_id is empty in 2 rows \(row 3, 5\)"):
        load_cohort(save(folder, "slide_id,case_id,label\ns1,p1,a\ns2,,b\n\ns3, ,b"), check_files=False)
    with pytest.raises(CohortError, match=r"slide_id is empty in 1 rows \(row 2\)"):
        load_cohort(save(folder, "slide_id,case_id,label\n,p1,a\ns2,p2,b"), check_files=False)


def test_unknown_columns_warn_with_near_names_or_fail_when_strict(folder):
    path = save(folder, "slide_id,patient_id,label,pathh,age\ns1,p1,a,x,50\ns2,p2,b,y,60")
    cohort = load_cohort(path, check_files=False)
    assert cohort.warnings == ("columns not used: pathh (did you mean path?), age",)
    assert cohort.table["age"].tolist() == ["50", "60"]
    with pytest.raises(CohortError, match=r"unknown columns: pathh \(did you mean path\?\), age"):
        load_cohort(path, check_files=False, strict=True)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("mpp", "abc", r"row 3, column mpp: 'abc' is not um per level-0 pixel, 0.05 to 20\. Correct it"),
        ("mpp", "264.58", "row 3, column mpp: '264.58' is not"),
        ("MPP", "0", "row 3, column MPP: '0' is not"),
        ("spacing_at_level_0", '"0,25"', "write a decimal point, not a comma"),
        ("mpp", "inf", "'inf' is not"),
        ("time", "-1", "row 3, column time: '-1' is not a time of follow-up"),
        ("event", "2", r"row 3, column event: '2' is not 1 \(true, dead\) where the event was seen"),
        ("event", "yes", "'yes' is not 1"),
    ],
)
def test_numbers_that_cannot_be(folder, column, value, message):
    path = save(folder, f"slide_id,patient_id,label,{column}\ns1,p1,a,\ns2,p2,b,{value}")
    with pytest.raises(CohortError, match=message):
        load_cohort(path, check_files=False)


def test_survival_columns_are_numbers(folder):
    path = save(folder, "slide_id,patient_id,label,time,event\ns1,p1,a,12.5,1\ns2,p2,b,,")
    table = load_cohort(path, check_files=False).table
    assert (table["time"].dtype, table["time"][0], table["event"][0]) == (np.float64, 12.5, 1.0)
    assert np.isnan(table["event"][1])


def test_a_cohort_with_real_slides(shared_data, tmp_path):
    path = save(
        tmp_path,
        "slide_id,patient_id,label\nCMU-1-Small-Region,p1,a\ntcga-cr-7395-01a-01-ts1,p2,b\nCropBreastSlide,p3,b",
    )
    cohort = load_cohort(path, slides_dir=shared_data / "slides")
    assert [Path(p).suffix for p in cohort.table["path"]] == [".svs", ".svs", ".tiff"]
