"""Tables of a document: one per suite, and the means."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from bench.run import DIED, Document


@dataclass(frozen=True)
class Cell:
    """A text and how it is coloured where colours are."""

    text: str
    style: str = ""


@dataclass
class Table:
    """A table that a terminal shows in colour and a file as plain text. Numbers stand right."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[Cell | str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 1  # columns of words, the rest are numbers

    def plain(self) -> str:
        texts = [[c.text if isinstance(c, Cell) else c for c in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.head, *texts, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if i < self.left else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (self.head, ["-" * width for width in widths], *texts)
        ]
        return "\n".join([self.title, *lines, *self.notes, ""])

    def print(self, file: TextIO | None = None) -> None:
        file = file or sys.stdout
        if not file.isatty():
            print(self.plain(), file=file)
            return
        try:
            from rich.console import Console
            from rich.measure import Measurement
            from rich.table import Table as RichTable
            from rich.text import Text
        except ImportError:
            print(self.plain(), file=file)
            return
        table = RichTable(title=self.title, title_justify="left", box=None, header_style="bold")
        for i, name in enumerate(self.head):
            table.add_column(name, justify="left" if i < self.left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(c.text, c.style) if isinstance(c, Cell) else c for c in row))
        console = Console(file=file)
        # Wider than the terminal is better than cut: no number is lost.
        wide = console.options.update(width=10_000)
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
        console.print(table)
        for note in self.notes:
            console.print(Text(note, "dim"))
        console.print()


def best_peer(entry: dict[str, Any]) -> str | None:
    """The fastest contestant that is not gpuconv."""
    times = {
        name: cell["median"]
        for name, cell in entry.get("cells", {}).items()
        if "median" in cell and not name.startswith("gpuconv")
    }
    return min(times, key=lambda name: times[name]) if times else None


def best_ratio(entry: dict[str, Any]) -> float | None:
    """gpuconv's speed over that of the best peer."""
    peer = best_peer(entry)
    if peer is None or "median" not in entry["cells"].get("gpuconv", {}):
        return None
    return float(entry["cells"][peer]["ratio"][1])


def operation(entry: dict[str, Any]) -> str:
    """fprop, dgrad or wgrad; fprop in a file that does not tell."""
    return str(entry.get("operation", "fprop"))


def operations(document: Document) -> list[str]:
    """Those that the document has rows of."""
    return list(dict.fromkeys(map(operation, document["rows"])))


def geomean(values: Iterable[float], weights: Iterable[float] | None = None) -> float | None:
    """The (weighted) geometric mean; None of nothing."""
    values = list(values)
    if not values:
        return None
    weights = [1.0] * len(values) if weights is None else list(weights)
    total = sum(w * math.log(v) for v, w in zip(values, weights, strict=True))
    return math.exp(total / sum(weights))


def suite_tables(document: Document) -> list[Table]:
    """One table per suite and operation."""
    tables = []
    for name, suite in document["suites"].items():
        for kind in operations(document):
            entries = [e for e in document["rows"] if e["suite"] == name and operation(e) == kind]
            if entries:
                title = suite["title"] + ("" if kind == "fprop" else f": {kind}")
                tables.append(_suite_table(document, f"{title}  ({suite['source']})", entries))
    return tables


def _suite_table(document: Document, title: str, entries: list[dict[str, Any]]) -> Table:
    cuda = document["backend"] == "cuda"
    others = [
        name
        for name in dict.fromkeys(n for e in entries for n in e.get("cells", {}))
        if name != "gpuconv" and any("median" in e.get("cells", {}).get(name, {}) for e in entries)
    ]
    times = ["cold", "warm", "host"] if cuda else ["time"]
    table = Table(
        title,
        ["row", "algorithm", *times, "±", "GFLOP/s", "GB/s", "of ceiling", "memory", "best peer",
         "ratio", *others],
        left=2,
    )  # fmt: skip
    for entry in entries:
        label = entry["key"].partition("/")[2].replace(f" {operation(entry)} ", " ")
        if entry["count"] > 1:
            label += f" (x{entry['count']})"
        if (entry.get("others") or 0) > _DISTURBED:
            label += " *"
        if "skipped" in entry:
            table.notes.append(f"{label}: left out: {entry['skipped']}")
            continue
        cells = entry["cells"]
        for name, cell in cells.items():
            for trouble in ("wrong", "failed"):
                if trouble in cell:
                    table.notes.append(f"{label}: {name} {trouble}: {cell[trouble]}")
        ours = cells.get("gpuconv", {})
        if "median" not in ours:
            reason = next((k for k in ("wrong", "failed", "unable") if k in ours), "no result")
            row: list[Cell | str] = [label, Cell(reason, "bold red")]
            row += [""] * (len(table.head) - 2 - len(others))
            table.rows.append([*row, *(_time(cells.get(n, {}).get("median")) for n in others)])
            continue
        peer, value = best_peer(entry), best_ratio(entry)
        table.rows.append(
            [
                label,
                ours["algorithm"],
                _time(ours["median"]),
                *([_time(ours["warm"]), _time(ours["host"])] if cuda else []),
                f"{50 * (ours['high'] - ours['low']) / ours['median']:.0f}%",
                f"{ours['flops_per_s'] / 1e9:.3g}",
                f"{ours['bytes_per_s'] / 1e9:.3g}",
                f"{100 * ours['of_ceiling']:.0f}% {entry['limit'][0]}",
                _bytes(ours.get("peak_bytes")),
                peer or "",
                _ratio(value),
                *(_ratio(cells.get(n, {}).get("ratio", [0, None])[1]) for n in others),
            ]
        )
    return table


def short_table(document: Document) -> Table:
    """A line per row: what a log has room for."""
    table = Table("", ["row", "algorithm", "time", "of ceiling", "best peer", "ratio"], left=2)
    for entry in document["rows"]:
        ours = entry.get("cells", {}).get("gpuconv", {})
        if "median" in ours:
            ceiling = f"{100 * ours['of_ceiling']:.0f}% {entry['limit'][0]}"
            time, peer, value = _time(ours["median"]), best_peer(entry) or "", best_ratio(entry)
            table.rows.append([entry["key"], ours["algorithm"], time, ceiling, peer, _ratio(value)])
        table.notes += _reasons(entry)
    return table


def _reasons(entry: dict[str, Any]) -> list[str]:
    """Why the row, or gpuconv in it, has no time; and what else of gpuconv's went wrong."""
    if "skipped" in entry:
        return [f"{entry['key']}: left out: {entry['skipped']}"]
    return [
        f"{entry['key']}: {name} {why}: {cell[why]}"
        for name, cell in entry["cells"].items()
        for why in ("wrong", "failed", *(("unable",) if name == "gpuconv" else ()))
        if name.startswith("gpuconv") and why in cell
    ]


def summary_table(document: Document) -> Table:
    """The means of every suite and operation, batch by batch."""
    names = [
        name
        for name in dict.fromkeys(n for e in document["rows"] for n in e.get("cells", {}))
        if not name.startswith("gpuconv")
    ]
    table = Table(
        "gpuconv's speed over the peers' (more than 1: gpuconv is faster)",
        ["suite", "rows", "geomean", "by layers", "whole", "worst", "< 0.9", *names],
    )
    groups: dict[str, list[dict[str, Any]]] = {}
    every = [entry for entry in document["rows"] if best_ratio(entry) is not None]
    for entry in every:
        groups.setdefault(f"{_group(entry)}, batch {entry['batch']}", []).append(entry)
    if len(groups) > 1:
        kinds = dict.fromkeys(map(operation, every))
        for kind in kinds if len(kinds) > 1 else ():
            groups[f"all {kind}"] = [entry for entry in every if operation(entry) == kind]
        groups["all"] = every
    for name, entries in groups.items():
        ratios = [best_ratio(entry) or 0.0 for entry in entries]
        counts = [entry["count"] for entry in entries]
        ours = sum(e["count"] * e["cells"]["gpuconv"]["median"] for e in entries)
        theirs = sum(e["count"] * e["cells"][best_peer(e)]["median"] for e in entries)
        table.rows.append(
            [
                name,
                str(len(entries)),
                _ratio(geomean(ratios)),
                _ratio(geomean(ratios, counts)),
                _ratio(theirs / ours),
                _ratio(min(ratios)),
                str(sum(r < 0.9 for r in ratios)),
                *(_ratio(_peer_geomean(entries, peer)) for peer in names),
            ]
        )
    table.notes = [
        "Against the best peer of each row: geometric mean; the same with each layer as often as "
        "the network has it; total times; the worst row; rows under 0.9.",
        "Under a peer's name: the geometric mean against that peer, over the rows that it can do.",
    ]
    return table


def _peer_geomean(entries: list[dict[str, Any]], peer: str) -> float | None:
    cells = [entry["cells"].get(peer, {}) for entry in entries]
    return geomean(cell["ratio"][1] for cell in cells if "ratio" in cell)


def _group(entry: dict[str, Any]) -> str:
    kind = operation(entry)
    return str(entry["suite"]) + ("" if kind == "fprop" else f" {kind}")


@dataclass(frozen=True)
class Choice:
    """What "auto" chose for a row of which other algorithms were measured, too."""

    group: str
    key: str
    chosen: str
    best: str
    own: float  # seconds
    least: float
    untimed: int  # algorithms whose predicted cost was too far from auto's to try them

    @property
    def loss(self) -> float:
        return self.own / self.least

    @property
    def good(self) -> bool:
        return self.loss <= 1.1


def choices(document: Document) -> list[Choice]:
    """Of every row that was measured with --algorithms.

    An algorithm that "auto" must not choose (because of NaN, of w's values, of rounding) is no
    better choice, however fast.
    """
    found = []
    for entry in document["rows"] if document.get("algorithms") is not None else ():
        cells = entry.get("cells", {})
        ours = cells.get("gpuconv", {})
        if "median" not in ours:
            continue
        others = {n.partition(".")[2]: c for n, c in cells.items() if n.startswith("gpuconv.")}
        times = {
            name: cell["median"]
            for name, cell in others.items()
            if "median" in cell and "only_by_name" not in cell
        }
        chosen = ours["algorithm"]
        times[chosen] = min(ours["median"], times.get(chosen, math.inf))
        best = min(times, key=lambda name: times[name])
        untimed = sum("unable" in cell and "predicted" in cell for cell in others.values())
        found.append(
            Choice(_group(entry), entry["key"], chosen, best, times[chosen], times[best], untimed)
        )
    return found


def algorithm_table(document: Document) -> Table | None:
    """Where "auto" is not the best choice."""
    losses = [choice for choice in choices(document) if not choice.good]
    if not losses:
        return None
    table = Table(
        'Rows where "auto" is more than 10% slower than the best algorithm',
        ["row", "auto", "best", "time of auto", "of the best", "auto/best"],
        left=3,
    )
    for c in sorted(losses, key=lambda choice: -choice.loss):
        times = _time(c.own), _time(c.least), f"{c.loss:.2f}"
        table.rows.append([c.key, c.chosen, c.best, *times])
    return table


def race_table(document: Document) -> Table:
    """Every algorithm's time beside what it was predicted to take, the fastest first."""
    table = Table("", ["row", "auto", "fastest first: time, predicted"], left=3)
    for entry in document["rows"]:
        cells = entry.get("cells", {})
        ours = cells.get("gpuconv", {})
        timed = {n.partition(".")[2]: c for n, c in cells.items() if n.startswith("gpuconv.")}
        if "algorithm" in ours:
            timed[ours["algorithm"]] = ours
        timed = {name: cell for name, cell in timed.items() if "median" in cell}
        texts = [
            f"{name} {_time(timed[name]['median'])}, {_time(timed[name]['predicted'])}"
            for name in sorted(timed, key=lambda name: timed[name]["median"])
        ]
        table.rows.append([entry["key"], ours.get("algorithm", ""), "; ".join(texts)])
        table.notes += _reasons(entry)
    return table


def choice_table(document: Document) -> Table | None:
    """How often "auto" is within 10% of the best algorithm; None where no others were measured."""
    every = choices(document)
    if not every:
        return None
    table = Table(
        'Is "auto" within 10% of the best algorithm?',
        ["suite", "rows", "within 10%", "share", "worst auto/best", "not timed"],
    )
    groups: dict[str, list[Choice]] = {}
    for choice in every:
        groups.setdefault(choice.group, []).append(choice)
    for name, group in [*groups.items(), ("all", every)]:
        good = sum(choice.good for choice in group)
        table.rows.append(
            [
                name,
                str(len(group)),
                str(good),
                Cell(f"{100 * good / len(group):.0f}%", "" if good >= 0.9 * len(group) else "red"),
                f"{max(choice.loss for choice in group):.2f}",
                str(sum(choice.untimed for choice in group)),
            ]
        )
    good = sum(choice.good for choice in every)
    table.notes = [
        f'"auto" is within 10% of the best on {good} of {len(every)} rows, '
        f"{100 * good / len(every):.1f}% (the aim is 90%).",
    ]
    if sum(choice.untimed for choice in every):
        table.notes.append(
            "Not timed: algorithms whose predicted cost is more than "
            f"{document['algorithms']:g} times auto's (--algorithms TIMES)."
        )
    return table


def heading(document: Document) -> str:
    """Where and with what: the lines above the tables."""
    machine, ceilings = document["machine"], document["ceilings"]
    where = machine.get("gpu") if document["backend"] == "cuda" else machine["cpu"]
    ends = [ceilings["start"], *([ceilings["end"]] if "end" in ceilings else [])]
    lines = [
        f"{where}, {machine['threads']} CPU threads; {document['backend']} backend, "
        f"{document['dtype']} ({document['precision']}); commit {document['commit'] or 'unknown'}",
        ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        "ceilings, before and after: "
        + "; ".join(f"{e['flops'] / 1e9:.4g} GFLOP/s, {e['bytes'] / 1e9:.4g} GB/s" for e in ends),
    ]
    lines += [f"CAUTION: {doubt}" for doubt in doubts(document)]
    if "cut" in document:
        lines.append(f"CUT SHORT: {document['cut']}")
    return "\n".join(lines) + "\n"


_DISTURBED = 0.15  # cores that others use, from which a row's times are in doubt


def doubts(document: Document) -> list[str]:
    """Why the times may be worth little."""
    found = []
    ceilings = document["ceilings"]
    others = [entry["others"] for entry in document["rows"] if entry.get("others") is not None]
    if disturbed := sum(cores > _DISTURBED for cores in others):
        found.append(
            f"other processes were at work during {disturbed} of {len(others)} rows (marked *), "
            f"using {sum(others) / len(others):.2f} cores on average; libraries whose threads wait "
            "for each other suffer most: measure again on a quiet machine"
        )
    if "end" in ceilings:
        for name, what in (("flops", "matrix product"), ("bytes", "copy")):
            change = ceilings["end"][name] / ceilings["start"][name]
            if not 0.85 < change < 1.18:
                found.append(f"the machine changed: the {what} ended at {change:.2f} of its speed")
    return found


def troubles(document: Document) -> list[str]:
    """gpuconv's own wrong and failed results: what must be nothing."""
    died = [
        f"{entry['key']}: {entry['skipped']}"
        for entry in document["rows"]
        if entry.get("skipped") == DIED
    ]
    return died + [
        f"{entry['key']}: {name} {trouble}: {cell[trouble]}"
        for entry in document["rows"]
        for name, cell in entry.get("cells", {}).items()
        for trouble in ("wrong", "failed")
        if name.startswith("gpuconv") and trouble in cell
    ]


def show(document: Document, file: TextIO | None = None) -> None:
    """Everything, for people."""
    print(heading(document), file=file)
    for table in suite_tables(document):
        table.print(file)
    if (summary := summary_table(document)).rows:
        summary.print(file)
    for judgement in (algorithm_table(document), choice_table(document)):
        if judgement:
            judgement.print(file)
    for trouble in troubles(document):
        print(trouble, file=file)


def _ratio(value: float | None) -> Cell:
    if value is None:
        return Cell("")
    style = "green" if value >= 1.1 else "" if value >= 0.9 else "yellow" if value >= 0.5 else "red"
    return Cell(f"{value:.3g}" if value < 100 else f"{value:.0f}", style)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >> shift:
            return f"{count / (1 << shift):.3g} {unit}"
    return f"{count} B"
