"""How good, how sure, how fast: metrics, intervals and tests, tables, figures and the report.

Figures (`plots`, `slide_figures`, `overlay`) and `report` are imported from their modules, since they load matplotlib.
"""

from lrmil.evaluation.comparison import Comparison, compare_report, write_joint_tables
from lrmil.evaluation.constant import constant_answer
from lrmil.evaluation.intervals import Interval, bootstrap, interval_columns, paired_bootstrap
from lrmil.evaluation.metrics import METRICS, fold_scores, score
from lrmil.evaluation.paired import compare_methods, delong, delong_test, holm, permutation_test
from lrmil.evaluation.predictions import Predictions
from lrmil.evaluation.recovery import Recovery, recovered_share
from lrmil.evaluation.scored import Scored, concatenate
from lrmil.evaluation.survival import kaplan_meier, log_rank, risk_groups
from lrmil.evaluation.tables import Cost, TextTable, read_results, result_row, results_frame, text_table, write_results
from lrmil.evaluation.values import Values, read_predictions

__all__ = [
    "METRICS",
    "Comparison",
    "Cost",
    "Interval",
    "Predictions",
    "Recovery",
    "Scored",
    "TextTable",
    "Values",
    "bootstrap",
    "compare_methods",
    "compare_report",
    "concatenate",
    "constant_answer",
    "delong",
    "delong_test",
    "fold_scores",
    "holm",
    "interval_columns",
    "kaplan_meier",
    "log_rank",
    "paired_bootstrap",
    "permutation_test",
    "read_predictions",
    "read_results",
    "recovered_share",
    "result_row",
    "results_frame",
    "risk_groups",
    "score",
    "text_table",
    "write_joint_tables",
    "write_results",
]
