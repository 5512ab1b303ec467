"""What the Chrome trace event format asks of a file, and what ui.perfetto.dev needs to show it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any


def check_schema(document: Mapping[str, Any]) -> None:
    """Assert that a document is such a file."""
    named, flows = set(), defaultdict(list)
    for event in document["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} <= set(event)
        assert all(isinstance(event[key], int) for key in ("pid", "tid"))
        phase = event["ph"]
        assert phase in "MXstfC"
        if phase == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            if event["name"] == "thread_name":
                named.add((event["pid"], event["tid"]))
            continue
        assert event["ts"] >= 0
        if phase == "X":
            assert event["dur"] >= 0
            assert (event["pid"], event["tid"]) in named
        elif phase in "stf":
            flows[event["id"]].append(event)
        else:
            assert isinstance(event["args"]["value"], int | float)
    for flow in flows.values():
        assert [event["ph"] for event in flow] == ["s", "t", "f"]
        assert flow[2]["bp"] == "e"
        assert flow[0]["ts"] <= flow[1]["ts"] <= flow[2]["ts"]
        for event in flow:  # each end lies in a span of its thread
            assert any(
                (x["pid"], x["tid"]) == (event["pid"], event["tid"])
                and x["ts"] <= event["ts"] <= x["ts"] + x["dur"]
                for x in document["traceEvents"]
                if x["ph"] == "X"
            )
