"""Cases that need a process of their own: `python -m lrmil.benchmarks.child KIND JSON` prints one line of JSON.

None then inherits the memory, threads or caches of another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Literal

Kind = Literal["size", "head"]


def in_own_process(kind: Kind, case: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Run one case in a fresh process; where that fails, the result has `failed`, which says why."""
    call = [sys.executable, "-m", "lrmil.benchmarks.child", kind, json.dumps(case)]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return case | {"failed": f"more than {limit_s:g} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return case | {"failed": "killed, out of memory?" if done.returncode < 0 else last[0]}
    return case | json.loads(done.stdout.strip().splitlines()[-1])


def main(kind: str, text: str) -> None:
    """Measure one case here."""
    if kind == "head":
        from lrmil.benchmarks.head_steps import measure_head

        print(json.dumps(measure_head(json.loads(text))))
    else:
        from lrmil.benchmarks.size import measure_slide

        print(json.dumps(measure_slide(json.loads(text))))


if __name__ == "__main__":
    main(*sys.argv[1:])
