"""The summary of a GPU test run that is committed: counts by file, from pytest's JUnit files, one a process.

    pytest -m gpu --junitxml=junit.xml
    python benchmarks/test_summary.py junit.xml --out benchmarks/results/h200/DATE-tests.json --commit SHA \\
        --device "NVIDIA H200" --versions torch=2.11.0 triton=3.6.0
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def summarise(junits: list[Path]) -> dict:
    """Totals, and passed / failed / skipped of every test file, with the names of what failed. `seconds` is the sum over
    processes, which may have run side by side."""
    files: dict[str, Counter[str]] = defaultdict(Counter)
    failures, dates, seconds = [], [], 0.0
    for junit in junits:
        suite = ET.parse(junit).getroot().find("testsuite")
        assert suite is not None, f"{junit} holds no testsuite"
        dates.append(str(suite.get("timestamp")))
        seconds += float(suite.get("time", 0))
        for case in suite.iter("testcase"):
            outcome = next((OUTCOMES[child.tag] for child in case if child.tag in OUTCOMES), "passed")
            files[str(case.get("classname"))][outcome] += 1
            if outcome == "failed":
                failures.append(f"{case.get('classname')}::{case.get('name')}")
    total = sum(files.values(), Counter())
    return {"date": min(dates), "seconds": round(seconds, 1), "processes": len(junits),
            **{k: total[k] for k in ("passed", "failed", "skipped")}, "failures": failures,
            "files": {name: dict(sorted(count.items())) for name, count in sorted(files.items())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("junit", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--versions", nargs="*", default=[])
    args = parser.parse_args()
    doc = {"schema": "narrowgemm-tests/1", "device": args.device, "commit": args.commit,
           "versions": dict(v.split("=", 1) for v in args.versions), "selection": "-m gpu", **summarise(args.junit)}
    args.out.write_text(json.dumps(doc, indent=1) + "\n")
    print(f"{doc['passed']} passed, {doc['failed']} failed, {doc['skipped']} skipped -> {args.out}")


if __name__ == "__main__":
    main()
