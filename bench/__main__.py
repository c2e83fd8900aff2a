"""``python -m bench``: measure, show, compare, plot, and the table of README."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"compare": _compare, "plot": _plot, "show": _show, "table": _table}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return _run(argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time gpuconv beside its peers. Also: python -m bench show A.json; "
        "compare A.json B.json; plot A.json --out DIR; table A.json ...",
    )
    add = parser.add_argument
    add("--suite", nargs="+", metavar="NAME", help="which suites; --list names them")
    add("--list", action="store_true", help="list the suites and peers, and stop")
    add("--operation", nargs="+", choices=("fprop", "dgrad", "wgrad"), default=["fprop"],
        help="forward (fprop), the input's gradient (dgrad), the weight's (wgrad)")  # fmt: skip
    add("--backend", choices=("numpy", "cuda"), help="the default one where left out")
    add("--batch", nargs="+", type=int, default=[1, 32], metavar="N", help="of the networks")
    add("--dtype", default="float32", help="float16, bfloat16, float32, float64")
    add("--precision", choices=("ieee", "tf32", "tf32x3"), default="ieee")
    add("--peers", nargs="*", metavar="NAME", help="all that are installed where left out")
    add("--threads", type=int, metavar="N", help="for everyone; all cores where left out")
    add("--filter", nargs="+", default=[""], metavar="TEXT",
        help="only rows with one of these in their key")  # fmt: skip
    add("--algorithms", nargs="?", type=float, const=4.0, metavar="TIMES",
        help="also time every algorithm whose predicted cost is up to TIMES (4) that of auto's, "
        "and judge the choice")  # fmt: skip
    add("--channels-last", action="store_true", help="also time gpuconv on channels-last memory")
    add("--quick", action="store_true", help="few suites, small rows, little time for each")
    add("--budget", type=float, metavar="S", help="seconds of sampling per row (1; quick 0.2)")
    add("--row-limit", type=float, metavar="S", default=3.0,
        help="leave out rows of which one call must take longer (3)")  # fmt: skip
    add("--deadline", type=float, metavar="S", help="begin no row after so many seconds")
    add("--out", type=Path, metavar="FILE.json", help="write the results here, row by row")
    add("--resume", action="store_true", help="go on with the run that --out is of")
    add("--commit", help="what the JSON names where there is no git")
    return parser


def _run(argv: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(argv)

    # Threads first: the libraries read their number when they are imported.
    from bench import machine

    threads = machine.fix_threads(options.threads)

    import gpuconv
    from bench import report, suites
    from bench.measure import Budget
    from bench.peers import PEERS
    from bench.run import Settings, run
    from gpuconv import backends

    if options.resume and options.out is None:
        parser.error("--resume takes --out FILE.json, the run to go on with")
    if options.list:
        for suite in suites.SUITES.values():
            print(f"{suite.name:16} {len(suite.rows()):4} rows  {suite.title} ({suite.source})")
        for backend, known in PEERS.items():
            print(f"peers of {backend}: " + ", ".join(
                name + ("" if peer.installed else " (not installed)")
                for name, peer in known.items()
            ))  # fmt: skip
        return 0
    backend = options.backend or gpuconv.default_backend()
    if backend == "cuda" and (reason := backends.why_no_cuda()):
        print(f"no CUDA device: {reason}", file=sys.stderr)
        return 2
    known = PEERS[backend]
    if unknown := sorted(set(options.peers or ()) - set(known)):
        parser.error(f"--peers {' '.join(unknown)}: it is one of {', '.join(known)}")
    peers = tuple(
        name
        for name, peer in known.items()
        if peer.installed and (options.peers is None or name in options.peers)
    )
    machine.tell_libraries(threads, set(peers))
    try:
        chosen = suites.select(
            options.suite,
            batches=[1] if options.quick else options.batch,
            dtype=options.dtype,
            precision=options.precision,
            operations=options.operation,
            contains=options.filter,
            quick=options.quick,
        )
    except ValueError as error:
        parser.error(str(error))
    if not chosen:
        parser.error(f"no row has {' or '.join(map(repr, options.filter))} in its key")
    budget = options.budget or (0.2 if options.quick else 1.0)
    settings = Settings(
        backend=backend,
        suites=chosen,
        dtype=options.dtype,
        precision=options.precision,
        peers=peers,
        threads=threads,
        algorithms=options.algorithms,
        channels_last=options.channels_last,
        budget=Budget(seconds=budget),
        row_limit=options.row_limit,
        deadline=options.deadline or float("inf"),
        out=options.out,
        resume=options.resume,
        commit=options.commit,
    )
    try:
        with _progress() as progress:
            document = run(settings, progress)
    except ValueError as error:  # it is no run that this one can go on with
        parser.error(str(error))
    report.show(document)
    return 1 if report.troubles(document) else 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar in a terminal, nothing elsewhere."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError:
        yield lambda done, of, name: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, of, name: None
        return
    columns = BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}")
    # Drawn only between rows: a thread that redraws would disturb what is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, of: int, name: str) -> None:
            bar.update(task, total=of, completed=done, description=name, refresh=True)

        yield progress


def _show(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench show")
    parser.add_argument("file", type=Path)
    options = parser.parse_args(argv)
    from bench import report
    from bench.run import read

    report.show(read(options.file))
    return 0


def _compare(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description="What changed from A to B beyond the noise."
    )
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument(
        "--contestant", default="gpuconv", metavar="NAME", help="gpuconv, or gpuconv.ALGORITHM"
    )
    options = parser.parse_args(argv)
    from bench import compare
    from bench.run import read

    compare.show(read(options.a), read(options.b), options.contestant)
    return 0


def _plot(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plot")
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(argv)
    from bench import plots
    from bench.run import read

    for path in plots.plot(read(options.file), options.out):
        print(path)
    return 0


def _table(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench table",
        description="The results in Markdown, as README shows them; several files are one result.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="file")
    options = parser.parse_args(argv)
    from bench import markdown
    from bench.run import read

    print(markdown.table([read(path) for path in options.files]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
