"""What a child process does: `python -m lrmil.benchmarks.case KIND JSON` prints one line of JSON, see `child`."""

from __future__ import annotations

import json
import sys

from lrmil.benchmarks.head_steps import measure_head
from lrmil.benchmarks.size import measure_slide


def main(kind: str, text: str) -> None:
    """Measure one case here."""
    measure = {"head": measure_head, "size": measure_slide}[kind]
    print(json.dumps(measure(json.loads(text))))


if __name__ == "__main__":
    main(*sys.argv[1:])
