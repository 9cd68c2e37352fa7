"""`lrmil labels`: label tables of the paper's cohorts, from the files that their portals offer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from lrmil.cohorts.builders.account import BuiltCohort

HELP = """Make cohort.csv for a cohort of the paper, from the files that you download.

TCGA: on the GDC portal choose the project (TCGA-BRCA, ...), download the clinical data as TSV and unpack clinical.tsv
(and follow_up.tsv); then the slide images of experimental strategy Diagnostic Slide, by a manifest and the GDC client.
Every slide, patient or row that is left out is counted, with the reason."""

Clinical = Annotated[
    list[Path],
    typer.Option(
        help="clinical.tsv of the GDC portal (Clinical > TSV), or an older Biotab or TCGAbiolinks table; "
        "repeat it for several projects."
    ),
]
OptionalClinical = Annotated[
    list[Path] | None, typer.Option(help="clinical.tsv of the GDC portal, if survival is wanted as a further task.")
]
FollowUp = Annotated[
    list[Path] | None,
    typer.Option(help="follow_up.tsv of the same download: newer releases keep the days of follow-up there."),
]
SlidesDir = Annotated[
    Path | None, typer.Option(help="Folder with the slide files; the subfolders of the GDC client are searched.")
]
SlideSheet = Annotated[
    Path | None,
    typer.Option(
        help="Sample sheet, manifest or biospecimen slide.tsv of the GDC: which slides to use, or all there are."
    ),
]
Out = Annotated[Path, typer.Option(help="Table to write.")]

labels = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help=HELP)


HISTOLOGY_HELP = {
    "tcga-brca": """IDC against ILC, by the diagnosis in the clinical table; mixed and other histologies are left out.

    Project TCGA-BRCA of the GDC portal. Further columns: survival (alive, dead), time (days), event, site.
    """,
    "tcga-nsclc": """LUAD against LUSC, by the project; by the diagnosis only where a table does not state the project.

    Projects TCGA-LUAD and TCGA-LUSC of the GDC portal. Further columns: survival, time (days), event, site.
    """,
    "tcga-rcc": """KIRP, KIRC and KICH, by the project; by the diagnosis only where a table does not state the project.

    Projects TCGA-KIRP, TCGA-KIRC and TCGA-KICH of the GDC portal. Further columns: survival, time (days), event, site.
    """,
}


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.add_typer(labels, name="labels")


def _add_histology(cohort: str, text: str) -> None:
    def histology(
        clinical: Clinical,
        slides_dir: SlidesDir = None,
        slide_sheet: SlideSheet = None,
        follow_up: FollowUp = None,
        out: Out = Path("cohort.csv"),
    ) -> None:
        from lrmil.cohorts.builders.build import Sources, build_histology

        _write(build_histology(cohort, Sources(clinical, follow_up or (), slides_dir, slide_sheet)), out)

    histology.__doc__ = text
    labels.command(cohort)(histology)


for _cohort, _text in HISTOLOGY_HELP.items():
    _add_histology(_cohort, _text)


@labels.command("brca-molecular")
def brca_molecular(
    pam50: Annotated[
        Path,
        typer.Option(
            help="Table of PAM50 calls by TCGA barcode: the subtype table of TCGAbiolinks (TCGAquery_subtype or "
            "PanCancerAtlas_subtypes), the clinical table of a cBioPortal study, or the supplement of the TCGA paper."
        ),
    ],
    slides_dir: SlidesDir = None,
    slide_sheet: SlideSheet = None,
    clinical: OptionalClinical = None,
    follow_up: FollowUp = None,
    out: Out = Path("cohort.csv"),
) -> None:
    """LumA, LumB, Basal and Her2 by PAM50, the paper's BRCA*; Normal-like is left out and counted.

    Slides: project TCGA-BRCA of the GDC portal.
    """
    from lrmil.cohorts.builders.build import Sources, build_molecular

    _write(build_molecular(pam50, Sources(clinical or (), follow_up or (), slides_dir, slide_sheet)), out)


@labels.command("survival")
def survival(
    project: Annotated[str, typer.Option(help="TCGA-BRCA, TCGA-LUAD, TCGA-LUSC, TCGA-KIRP or TCGA-KIRC.")],
    clinical: Clinical,
    slides_dir: SlidesDir = None,
    slide_sheet: SlideSheet = None,
    follow_up: FollowUp = None,
    need_time: Annotated[
        bool, typer.Option("--need-time", help="Leave out patients without a time, for survival analysis.")
    ] = False,
    out: Out = Path("cohort.csv"),
) -> None:
    """Overall survival of one TCGA project, whatever the histology.

    Columns: survival (alive, dead: the paper's task), time (days to death or last follow-up), event (1 dead, 0 alive).
    """
    from lrmil.cohorts.builders.build import Sources, build_survival

    sources = Sources(clinical, follow_up or (), slides_dir, slide_sheet)
    _write(build_survival(project, sources, need_time=need_time), out)


@labels.command("bracs")
def bracs(
    spreadsheet: Annotated[Path, typer.Option(help="BRACS.xlsx, which comes with the data set.")],
    slides_dir: Annotated[Path | None, typer.Option(help="Folder of the slides (BRACS_WSI); subfolders too.")] = None,
    split: Annotated[
        Literal["official", "cross-validation"],
        typer.Option(help="Keep the official train / val / test as column fold, or leave folds to the run."),
    ] = "official",
    out: Out = Path("cohort.csv"),
) -> None:
    """The seven classes N, PB, UDH, FEA, ADH, DCIS and IC of BRACS.

    Slides and spreadsheet are on the site of the BRACS data set, after registration. The paper's five folds need
    `--split cross-validation`: folds by patient, since most patients have several slides.
    """
    from lrmil.cohorts.builders.bracs import build_bracs

    _write(build_bracs(spreadsheet, slides_dir, official_split=split == "official"), out)


def _write(built: BuiltCohort, out: Path) -> None:
    for line in built.lines():
        print(line)
    built.write(out)
    print(f"wrote {out}")
