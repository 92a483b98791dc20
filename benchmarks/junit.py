"""Reads reports that `pytest --junitxml` wrote. It needs nothing but Python."""

from __future__ import annotations

import xml.etree.ElementTree
from typing import Any

MAX_FAILURES = 40


def read(text: str) -> dict[str, Any]:
    """Return the numbers of tests, failures, errors and skipped tests, and the first lines of the first failures."""
    (suite,) = xml.etree.ElementTree.fromstring(text).iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failures = [
        f"{case.get('classname')}::{case.get('name')}: {(problem.get('message') or '').partition(chr(10))[0][:300]}"
        for case in suite.iter("testcase")
        for problem in [*case.iter("failure"), *case.iter("error")]
    ]
    return counts | {"first_failures": failures[:MAX_FAILURES]}
