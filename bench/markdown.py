"""Documents as the Markdown tables that README shows, numbers and words as they stand there.

A number is gpuconv's speed over the other's. The suites and the networks' layers stand beside the
best peer of each row, forward and backward; pictures and signals beside every library.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench.report import best_ratio, choices, doubts, geomean, operation
from bench.run import Document
from bench.suites import SUITES

Entry = dict[str, Any]

WORDS = {"fprop": "forward", "dgrad": "input gradient", "wgrad": "weight gradient"}
# What gpuconv itself runs as where a column is not of its time on channels-first memory.
OURS = {"both channels last": "gpuconv_last"}
# The columns: of several ways of calling a library its fastest counts, by name where it has one.
LIBRARIES = {
    "torch, NCHW": {"torch": "", "torch_bm": ""},
    "torch, channels last": {"torch_last": "", "torch_last_bm": ""},
    "both channels last": {"torch_last": "", "torch_last_bm": ""},
    "JAX": {"jax": ""},
    "OpenCV": {"opencv": "filter2D", "opencv_sep": "sepFilter2D"},
    "SciPy": {
        "convolve2d": "convolve2d",
        "fftconvolve": "fftconvolve",
        "ndimage": "ndimage.correlate",
        "ndimage_sep": "ndimage.correlate1d",
    },
    "NumPy": {"np.correlate": ""},
    "cupyx.scipy": {
        "cupyx_convolve2d": "convolve2d",
        "cupyx_fftconvolve": "fftconvolve",
        "cupyx_ndimage": "ndimage.correlate",
        "cupyx_ndimage_sep": "ndimage.correlate1d",
    },
}


def table(documents: Sequence[Document]) -> str:
    """How it was measured, the means, and a line per layer, picture and signal.

    Documents of one device are one result; each device has tables of its own.
    """
    devices: dict[str, list[Document]] = {}
    for document in documents:
        devices.setdefault(_device(document), []).append(document)
    parts = []
    for some in devices.values():
        rows = {entry["key"]: entry for document in some for entry in document["rows"]}
        entries = [entry for entry in rows.values() if best_ratio(entry) is not None]
        layers = [entry for entry in entries if not _plane(entry)]
        planes = [entry for entry in entries if _plane(entry)]
        parts += [*map(_measured, some), _means(layers, planes)]
        if len({entry["suite"] for entry in entries} - {"sample"}) > 1:
            parts += _suites(entries, some)
        parts += [_layers(layers)] if layers else []
        parts += [_planes(planes)] if planes else []
    return "\n\n".join(parts)


def _device(document: Document) -> str:
    machine = document["machine"]
    return str(machine["gpu"] if document["backend"] == "cuda" else machine["cpu"])


def _measured(document: Document) -> str:
    line = (
        f"Measured by `{document['command']}` on {_device(document)}, "
        f"{document['machine']['threads']} CPU threads, {document['dtype']}, "
        f"{document['created'][:10]}."
    )
    return "\n".join([line, *(f"CAUTION: {doubt}" for doubt in doubts(document))])


def _means(layers: Sequence[Entry], planes: Sequence[Entry]) -> str:
    """The geometric means of every operation and batch."""
    batches = sorted({entry["batch"] for entry in layers})
    groups = {
        f"{WORDS[kind]}, batch {batch}": [
            e for e in layers if operation(e) == kind and e["batch"] == batch
        ]
        for kind in WORDS
        for batch in batches
    }
    groups["pictures and signals"] = list(planes)
    names = _libraries([*layers, *planes])
    lines = [
        [
            group,
            str(len(entries)),
            _number(_mean(entries)),
            *(_number(_mean_against(entries, name)) for name in names),
        ]
        for group, entries in groups.items()
        if entries
    ]
    return _markdown(["geometric mean", "rows", "best of all", *names], lines)


def _suites(entries: Sequence[Entry], documents: Sequence[Document]) -> list[str]:
    """A line per suite: of networks against the best peer of each layer, of others per library.

    The last column says on how many rows "auto" was within 10% of the fastest algorithm, where all
    were timed.
    """
    good: dict[str, list[bool]] = {}
    for choice in (choice for document in documents for choice in choices(document)):
        good.setdefault(choice.key.partition("/")[0], []).append(choice.good)
    networks: dict[str, list[Entry]] = {}
    others: dict[str, list[Entry]] = {}
    for entry in entries:
        kind = networks if SUITES[entry["suite"]].kind == "network" else others
        kind.setdefault(entry["suite"], []).append(entry)
    columns = _columns(itertools.chain(*networks.values()))
    libraries = _libraries(itertools.chain(*others.values()))

    def line(suite: str, rows: list[Entry], numbers: list[float | None]) -> list[str]:
        own = good.get(suite)
        last = [f"{sum(own)} of {len(own)}" if own else ""] * bool(good)
        title = SUITES[suite].title.partition(",")[0]
        return [title, str(len(rows)), *map(_number, numbers), *last]

    last = ['"auto" within 10%'] * bool(good)
    tables = []
    if networks:
        words = [f"{WORDS[kind]}, batch {batch}" for kind, batch in columns]
        lines = [
            line(suite, rows, [_mean(e for e in rows if _column(e) == c) for c in columns])
            for suite, rows in networks.items()
        ]
        tables.append(_markdown(["network", "rows", *words, *last], lines))
    if others:
        lines = [
            line(suite, rows, [_mean(rows), *(_mean_against(rows, name) for name in libraries)])
            for suite, rows in others.items()
        ]
        head = ["pictures and signals", "rows", "best of all", *libraries, *last]
        tables.append(_markdown(head, lines))
    return tables


def _mean(entries: Iterable[Entry]) -> float | None:
    """Against the best peer of each row."""
    return geomean(filter(None, map(best_ratio, entries)))


def _mean_against(entries: Iterable[Entry], library: str) -> float | None:
    return geomean(ratio for entry in entries for ratio, _ in _against(entry, library))


def _column(entry: Entry) -> tuple[str, int]:
    return operation(entry), entry["batch"]


def _columns(entries: Iterable[Entry]) -> list[tuple[str, int]]:
    """The operations and batches that occur, in the order of README's tables."""
    found = {_column(entry) for entry in entries}
    return sorted(found, key=lambda column: (list(WORDS).index(column[0]), column[1]))


def _layers(entries: Sequence[Entry]) -> str:
    """A line per layer, a column per operation and batch, against the best peer of each."""
    columns = _columns(entries)
    rows: dict[tuple[str, str], dict[tuple[str, int], Entry]] = {}
    for entry in entries:
        row = rows.setdefault((entry["suite"], entry["name"]), {})
        row[_column(entry)] = entry
    lines = [
        [
            title(next(iter(row.values()))),
            *(_number(best_ratio(row[column])) if column in row else "" for column in columns),
        ]
        for row in rows.values()
    ]
    return _markdown(
        ["layer", *(f"{WORDS[kind]}, batch {batch}" for kind, batch in columns)], lines
    )


def _planes(entries: Sequence[Entry]) -> str:
    """A line per picture or signal, a column per library."""
    names = _libraries(entries)
    lines = []
    for entry in entries:
        cells = []
        for name in names:
            best = next(iter(_against(entry, name)), None)
            called = f" (`{best[1]}`)" if best and best[1] else ""
            cells.append(_number(best[0]) + called if best else "")
        lines.append([title(entry), *cells])
    return _markdown(["picture or signal", *names], lines)


def title(entry: Entry) -> str:
    """What the row is, in words: "ResNet-50 3x3/2, 128 channels at 56x56"."""
    suite, name = entry["suite"], entry["name"]
    if suite == "sample":
        suite, _, name = name.partition("/")
    if SUITES[suite].kind != "network":
        kinds = {"gaussian": "Gaussian, ", "mnist": f"{entry['batch']} small pictures, "}
        return kinds.get(suite, "") + str(name)
    options = dict(re.findall(r" (stride|dilation|groups)=(\d+)", entry["problem"]))
    groups = int(options.get("groups", 1))
    channels, filters = entry["x"][1], entry["w"][0]
    transposed = operation(entry) == "fprop" and entry["problem"].startswith("dgrad")
    if transposed:
        filters = entry["w"][1] * groups
    words = [SUITES[suite].title.partition(",")[0]]
    words += ["transposed"] * transposed
    words += [] if groups == 1 else ["depthwise" if groups == channels else "grouped"]
    stride = f"/{options['stride']}" if "stride" in options else ""
    words.append(_extents(entry["w"]) + stride)
    words += [f"dilated {options['dilation']}"] if "dilation" in options else []
    changed = "" if filters == channels else f" to {filters}"
    return f"{' '.join(words)}, {channels}{changed} channels at {_extents(entry['x'])}"


def _extents(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[2:]))


def _plane(entry: Entry) -> bool:
    """Whether it is one filter on pictures or signals."""
    return operation(entry) == "fprop" and entry["x"][1] == entry["w"][0] == 1


def _libraries(entries: Iterable[Entry]) -> list[str]:
    """Those that have a result of any of the rows."""
    entries = list(entries)
    return [name for name in LIBRARIES if any(_against(entry, name) for entry in entries)]


def _against(entry: Entry, library: str) -> list[tuple[float, str]]:
    """The ratio against the library, with the name of its fastest function; nothing without one."""
    ours = entry["cells"].get(OURS.get(library, "gpuconv"), {}).get("ratio")
    if ours is None:
        return []
    found = [
        (float(cell["ratio"][1]) / float(ours[1]), called)
        for peer, called in LIBRARIES[library].items()
        if "ratio" in (cell := entry["cells"].get(peer, {}))
    ]
    return [min(found)] if found else []


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines
    )
