"""Run one share of some tests: `python share_tests.py INDEX COUNT RESULTS [PYTEST ARGUMENTS]`.

Of the tests that pytest selects, every COUNT-th from the INDEX-th on. What became of each is added to the file RESULTS,
one line of JSON a test, as soon as it is known: of a process that dies it says how far that came.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


class Share:
    """The plugin: it picks the tests and writes down how they ended."""

    def __init__(self, index: int, count: int, results: Path) -> None:
        self.index, self.count, self.results = index, count, results
        self.seconds = 0.0

    @pytest.hookimpl(trylast=True)  # after the options -m and -k
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.index :: self.count]

    def pytest_runtest_logstart(self) -> None:
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        decisive = report.when == "call" or report.skipped  # what is skipped has no call
        if decisive or report.failed:
            self.write(report.nodeid, report.longreprtext if report.failed else "", report.skipped)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid, report.longreprtext, False)

    def write(self, name: str, failure: str, skipped: bool) -> None:
        line = {"check": name.partition("::")[2] or name, "failure": failure, "seconds": self.seconds}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | ({"skipped": True} if skipped else {})) + "\n")


if __name__ == "__main__":
    # The folders of this file and of the checkout must go: their modules would hide the host's.
    sys.path[:] = [place for place in sys.path[1:] if place]
    share = Share(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    status = pytest.main(sys.argv[4:], plugins=[share])
    sys.exit(0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status)
