"""How many cases a fault test does, and the table at the end: python -m pytest tests/faults --full
(or make faults)."""

from collections import defaultdict

import pytest


@pytest.fixture
def cases(request: pytest.FixtureRequest, record_property):
    """cases(what, full, few): how many of the cases of `what` to do: all of them with --full, else
    a few."""

    def choose(what: str, full: int, few: int) -> int:
        number = full if request.config.getoption("--full") else few
        record_property("fault", [what, number])
        return number

    return choose


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    table: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for what, number in (value for key, value in report.user_properties if key == "fault"):
                row = table[what]
                row[0] += number
                row[1] += number if outcome == "failed" else 0
                row[2] += report.duration
    if table:
        terminalreporter.section("faults")
        for what, (number, failed, seconds) in table.items():
            verdict = "as promised" if not failed else f"FAILED (of {failed:.0f} cases)"
            terminalreporter.write_line(
                f"{what:<72} {number:>6.0f} cases  {seconds:>6.1f} s  {verdict}"
            )
