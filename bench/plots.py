"""Pictures of a document: ratio bars per suite, a roofline, time against size for filters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.report import best_peer, best_ratio, operation, operations
from bench.run import Document

# The colours of Okabe and Ito: told apart by everyone.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
_MARKERS = "osD^vP*X"


def plot(document: Document, folder: Path) -> list[Path]:
    """Draw everything that the document has data for; the files written."""
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    plt = import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        drawings: list[tuple[str, Callable[[], Any]]] = []
        for kind in operations(document):
            suffix = "" if kind == "fprop" else f"_{kind}"
            rows = [entry for entry in document["rows"] if operation(entry) == kind]
            part = document | {"rows": rows}
            drawings += [
                (f"ratio_{suite}{suffix}", partial(_ratio_bars, plt, part, suite))
                for suite in document["suites"]
            ]
            drawings.append((f"roofline{suffix}", partial(_roofline, plt, part)))
            drawings += [
                (f"time_{suite}{suffix}", partial(_filters, plt, part, suite))
                for suite in ("filters", "gaussian")
            ]
        for name, draw in drawings:
            if figure := draw():
                path = folder / f"{name}.png"
                figure.savefig(path, dpi=130, bbox_inches="tight")
                plt.close(figure)
                written.append(path)
    return written


def _ratio_bars(plt: Any, document: Document, suite: str) -> Any:
    """A bar per row: how much faster than the best peer, on a scale where 2x and 1/2 are alike."""
    entries = [e for e in document["rows"] if e["suite"] == suite and best_ratio(e) is not None]
    if not entries:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.17 * len(entries)))
    ratios = [best_ratio(e) or 1.0 for e in entries]
    colours = [_COLOURS[0] if r >= 1 else _COLOURS[1] for r in ratios]
    places = range(len(entries))
    axes.barh(places, [r - 1 for r in ratios], left=1, color=colours, height=0.75)
    for place, entry, r in zip(places, entries, ratios, strict=True):
        low, _, high = entry["cells"][best_peer(entry)]["ratio"]
        axes.plot([low, high], [place, place], color="black", linewidth=0.8)
        axes.annotate(
            f"{r:.2g} {best_peer(entry)}", (max(1.0, r, high), place), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=6,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    axes.set_yticks(places, [e["key"].partition("/")[2] for e in entries], fontsize=6)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("speed of gpuconv / speed of the best peer (named at the bar)")
    axes.set_title(f"{document['suites'][suite]['title']}: {_where(document)}", fontsize=9)
    return figure


def _roofline(plt: Any, document: Document) -> Any:
    """FLOP/s against FLOP per byte, under the two ceilings that the run measured."""
    entries = [e for e in document["rows"] if "median" in e.get("cells", {}).get("gpuconv", {})]
    if not entries:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5))
    ceilings = document["ceilings"]["start"]
    intensities = [e["flops"] / e["bytes"] for e in entries]
    left, right = min([0.2, *intensities]), max([2000.0, *intensities])
    ridge = ceilings["flops"] / ceilings["bytes"]
    axes.plot(
        [left, ridge, right],
        [left * ceilings["bytes"] / 1e9, ceilings["flops"] / 1e9, ceilings["flops"] / 1e9],
        color="black",
        label=f"{ceilings['bytes'] / 1e9:.3g} GB/s copy, {ceilings['flops'] / 1e9:.3g} GFLOP/s "
        "matrix product",
    )
    for i, suite in enumerate(document["suites"]):
        mine = [
            (e["flops"] / e["bytes"], e["cells"]["gpuconv"]["flops_per_s"] / 1e9)
            for e in entries
            if e["suite"] == suite
        ]
        if mine:
            axes.scatter(
                *zip(*mine, strict=True), s=16, alpha=0.8, label=suite,
                color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i // len(_COLOURS)],
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP of the direct sum per byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Roofline: {_where(document)}", fontsize=9)
    axes.legend(fontsize=6, loc="lower right")
    return figure


def _filters(plt: Any, document: Document, suite: str) -> Any:
    """Time against filter size, a panel per picture size, and where the algorithm changes."""
    found: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for entry in document["rows"]:
        match = re.fullmatch(r"(\d+)x\d+ (\d+)x\d+", entry["name"])
        if entry["suite"] == suite and match and "cells" in entry and "uint8" not in entry["key"]:
            found.setdefault(int(match[1]), []).append((int(match[2]), entry))
    if not found:
        return None
    figure, panels = plt.subplots(
        1, len(found), figsize=(3.2 * len(found) + 1, 3.4), squeeze=False, sharey=True
    )
    names = list(
        dict.fromkeys(
            name
            for rows in found.values()
            for _, entry in rows
            for name, cell in entry["cells"].items()
            if "median" in cell
        )
    )
    for axes, (size, rows) in zip(panels[0], sorted(found.items()), strict=True):
        rows.sort(key=lambda row: row[0])
        for i, name in enumerate(names):
            points = [
                (filter, entry["cells"][name]["median"] * 1e3)
                for filter, entry in rows
                if "median" in entry["cells"].get(name, {})
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=_COLOURS[i % len(_COLOURS)],
                    marker=_MARKERS[i % len(_MARKERS)],
                    markersize=3,
                    linewidth=2.2 if name == "gpuconv" else 1,
                    linestyle="--" if name.startswith("gpuconv.") else "-",
                    label=name,
                )
        for filter, before, after in crossovers(rows):
            axes.axvline(filter, color="grey", linewidth=0.6, linestyle=":")
            axes.annotate(
                f"{before} | {after}", (filter, 0.98), xycoords=("data", "axes fraction"),
                ha="center", va="top", fontsize=6,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([f for f, _ in rows], [str(f) for f, _ in rows])
        axes.minorticks_off()
        axes.set_title(f"{size}x{size}", fontsize=8)
        axes.set_xlabel("filter, R = S")
    panels[0][0].set_ylabel("ms")
    handles = {
        label: handle
        for axes in panels[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), fontsize=6, loc="center left", bbox_to_anchor=(0.92, 0.5)
    )
    figure.suptitle(f"{document['suites'][suite]['title']}: {_where(document)}", fontsize=9)
    return figure


def crossovers(
    rows: Iterable[tuple[int, dict[str, Any]]],
) -> list[tuple[float, str, str]]:
    """Between which filter sizes gpuconv's choice changes: (their geometric middle, from, to)."""
    chosen = [
        (size, entry["cells"]["gpuconv"]["algorithm"])
        for size, entry in rows
        if "median" in entry["cells"].get("gpuconv", {})
    ]
    return [
        ((a * b) ** 0.5, before, after)
        for (a, before), (b, after) in pairwise(chosen)
        if before != after
    ]


def _where(document: Document) -> str:
    machine = document["machine"]
    if document["backend"] == "cuda":
        where = f"{machine.get('gpu', 'GPU')}, {document['dtype']} ({document['precision']})"
    else:
        where = f"{machine['cpu']}, {machine['threads']} threads, {document['dtype']}"
    kinds = [kind for kind in operations(document) if kind != "fprop"]
    return ", ".join([where, *kinds])
