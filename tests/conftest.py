"""What holds for every test."""

from __future__ import annotations

import logging
import os
import sys

import pytest
import structlog
from hypothesis import HealthCheck, settings

# Kernels run in Triton's interpreter, on any machine; read when their modules are imported.
os.environ["TRITON_INTERPRET"] = "1"

# The machine may be busy: examples that are slow once, to run or to draw, say nothing.
settings.register_profile("duck", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("duck")

# Commands that run inside a test would bind every later event to that test's captured stderr.
structlog.configure(
    wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    logger_factory=structlog.PrintLoggerFactory(sys.__stderr__),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="also what is marked full: all combinations"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skipped = pytest.mark.skip(reason="a combination that --full adds")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skipped)


@pytest.fixture(autouse=True)
def _events_go_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duck.log.configure", lambda *_args, **_more: None)
