"""Cases that need a process of their own: none then inherits the memory, threads or caches of another."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Literal

Kind = Literal["size", "head"]


def in_own_process(kind: Kind, case: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Run one case in a fresh process; where that fails, the result has `failed`, which says why."""
    call = [sys.executable, "-m", "lrmil.benchmarks.case", kind, json.dumps(case)]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return case | {"failed": f"more than {limit_s:g} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return case | {"failed": "killed, out of memory?" if done.returncode < 0 else last[0]}
    return case | json.loads(done.stdout.strip().splitlines()[-1])
