"""Runs the matrix and ends with one line of JSON. Exit code 1 if a case fails."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from lorax_serve.kernels.build import instruction_sets
from tests.fidelity.matrix import GROUPS, TOLERANCE, Case, run_group, write_group


def main() -> int:
    """Run all groups that this machine can."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    groups = [g for g in GROUPS if g.kernels != "compiled" or instruction_sets()]
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as place:
        written = {
            model: write_group(model, Path(place) / model)
            for model in dict.fromkeys(group.model for group in groups)
        }
        for group in groups:
            for case in run_group(group, *written[group.model]):
                word = "ok" if case.passed else "FAILED"
                print(f"{group!s:42} {case.variant:44} {case.error:.1e} {word}")
                cases.append(case)
    worst = {
        dtype: max(case.error for case in cases if case.group.dtype == dtype) for dtype in TOLERANCE
    }
    passed = sum(case.passed for case in cases)
    print(json.dumps({"cases": len(cases), "passed": passed, "worst_error": worst}))
    return 0 if passed == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
