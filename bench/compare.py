"""What changed from one document to another, beyond the noise.

A change counts when it is larger than both 5% and the two runs' spreads together: half the distance
of the quartiles of each, twice. Two more numbers tell a slow machine from slow code: how much the
ceilings changed, and the same change with each row's time divided by that of the best peer which
both runs have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TextIO

from bench.report import Cell, Table, geomean, operation
from bench.run import Document

_LEAST = 0.05  # a change below this is none


@dataclass(frozen=True)
class Change:
    """One row in both documents."""

    key: str
    operation: str
    before: float
    after: float
    noise: float  # of the ratio, as a fraction
    against_peers: float | None  # the speed-up with both times in units of a peer's

    @property
    def speedup(self) -> float:
        return self.before / self.after

    @property
    def counts(self) -> bool:
        return abs(math.log(self.speedup)) > math.log1p(max(_LEAST, self.noise))


def changes(a: Document, b: Document, contestant: str = "gpuconv") -> list[Change]:
    """Of every row that both documents have timed, the largest slow-down first."""
    after = {entry["key"]: entry.get("cells", {}) for entry in b["rows"]}
    found = []
    for entry in a["rows"]:
        old, new = entry.get("cells", {}), after.get(entry["key"], {})
        x, y = old.get(contestant, {}), new.get(contestant, {})
        if "median" not in x or "median" not in y:
            continue
        peers = [
            name
            for name, cell in old.items()
            if not name.startswith("gpuconv") and "median" in cell and "median" in new.get(name, {})
        ]
        against = None
        if peers:
            peer = min(peers, key=lambda name: old[name]["median"])
            drift = old[peer]["median"] / new[peer]["median"]
            against = x["median"] / y["median"] / drift
        noise = _spread(x) + _spread(y)
        times = x["median"], y["median"]
        found.append(Change(entry["key"], operation(entry), *times, noise, against))
    return sorted(found, key=lambda change: change.speedup)


def _spread(cell: dict[str, Any]) -> float:
    return float((cell["high"] - cell["low"]) / cell["median"])


def table(a: Document, b: Document, contestant: str = "gpuconv") -> Table:
    """The rows that changed, and what did not."""
    every = changes(a, b, contestant)
    result = Table(
        f"{contestant}: from {_name(a)} to {_name(b)}",
        ["row", "before", "after", "speed-up", "noise", "beside peers"],
    )
    for change in every:
        if change.counts:
            result.rows.append(
                [
                    change.key,
                    _milliseconds(change.before),
                    _milliseconds(change.after),
                    Cell(f"{change.speedup:.2f}", "green" if change.speedup > 1 else "red"),
                    f"{100 * change.noise:.0f}%",
                    "" if change.against_peers is None else f"{change.against_peers:.2f}",
                ]
            )
    faster = sum(c.counts and c.speedup > 1 for c in every)
    slower = sum(c.counts and c.speedup < 1 for c in every)
    result.notes.append(
        f"{len(every)} rows in both: {faster} faster, {slower} slower, "
        f"{len(every) - faster - slower} unchanged within the noise."
    )
    kinds = dict.fromkeys(change.operation for change in every)
    for kind in kinds:
        some = [change for change in every if change.operation == kind]
        mean = geomean(change.speedup for change in some)
        beside = geomean(c.against_peers for c in some if c.against_peers is not None)
        result.notes.append(
            f"Geometric mean of the speed-ups{f' of {kind}' if len(kinds) > 1 else ''}: {mean:.3f}"
            + ("" if beside is None else f"; beside the peers: {beside:.3f}")
        )
    keys = [{entry["key"] for entry in d["rows"] if "cells" in entry} for d in (a, b)]
    only = len(keys[0] - keys[1]), len(keys[1] - keys[0])
    if any(only):
        result.notes.append(f"Rows only in the first: {only[0]}; only in the second: {only[1]}.")
    for name, what in (("flops", "matrix product"), ("bytes", "copy")):
        change_of_machine = b["ceilings"]["start"][name] / a["ceilings"]["start"][name]
        if not 0.95 < change_of_machine < 1.05:
            result.notes.append(f"The machine's {what} went at {change_of_machine:.2f} its speed.")
    for part in ("machine", "versions"):
        names = a[part].keys() | b[part].keys()
        for name in sorted(names):
            if a[part].get(name) != b[part].get(name):
                result.notes.append(f"{name}: {a[part].get(name)} -> {b[part].get(name)}")
    return result


def show(a: Document, b: Document, contestant: str = "gpuconv", file: TextIO | None = None) -> None:
    table(a, b, contestant).print(file)


def _name(document: Document) -> str:
    return f"{(document['commit'] or 'unknown')[:10]} ({document['created']})"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
