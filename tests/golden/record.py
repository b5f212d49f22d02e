"""Record what training computes, bit for bit, and compare two recordings.

python tests/golden/record.py --out FOLDER [--only PATTERN ...] [--jobs N]
python tests/golden/record.py --compare FOLDER OTHER

The first form makes the runs of cases.py with `python -m stylegan_pg` in a temporary folder and writes FOLDER/CASE.json
for each: nimg and phase of the last checkpoint, name, shape, dtype and SHA-256 of each of its tensors, its running
state, the lines of statistics and metrics without times, and digests of sample grids and of the final snapshot. All of
them take about ten minutes on one core. The second form names every difference; its exit code is 1 if a number differs.
Only recordings of one machine can be compared like this, because other processors round otherwise.

Nothing here imports the package: see commands.py. With --fresh each command is started in a new interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import commands  # it must be imported first, because it sets the number of threads
import pictures
import reading
from cases import CASES, Case


def record(case: Case, folder: Path, *, fresh: bool) -> dict[str, Any]:
    """Make one run below `folder`, and return its recording."""
    if case.needs and importlib.util.find_spec(case.needs) is None:
        return {"skipped": f"{case.needs} is not installed"}
    run, output = folder / "runs" / case.name, folder / "runs" / f"{case.name}.txt"
    init = ""
    if case.init:
        init = str(reading.newest_checkpoint(folder / "runs" / case.init).relative_to(folder))
    config = case.config or "tiny.yaml"
    for leg in ({}, *case.legs):
        commands.call(["train", config, *case.arguments(leg, init)], folder, output, fresh=fresh, ranks=case.ranks)
    found = {"arguments": [config, *case.arguments({}, init)], **reading.recording(run)}
    snapshot = str(reading.final_snapshot(run).relative_to(folder))
    for number, command in enumerate(case.commands):
        out, said = folder / "runs" / f"{case.name}-{number}", output.with_name(f"{case.name}-{number}.txt")
        given = [snapshot if part == "SNAPSHOT" else part for part in command]
        commands.call([*given, "--out", str(out.relative_to(folder))], folder, said, fresh=fresh)
        found[f"command {number}"] = {"pictures": reading.pictures_in(out), "printed": _tables(said)}
    return found


def _tables(path: Path) -> list[Any]:
    """Return the JSON objects among the lines of a file, except those that only name other files."""
    tables = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    return [{k: v for k, v in table.items() if k != "seconds"} for table in tables]


def chosen(patterns: Iterable[str]) -> list[Case]:
    """Return the cases whose names match one of the patterns, preceded by the cases that they start from."""
    names = [name for name in CASES if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    sources = {CASES[name].init for name in names} - {""}
    return [CASES[name] for name in [*sorted(sources), *(name for name in names if name not in sources)]]


def prepare(folder: Path, cases: list[Case], *, fresh: bool) -> None:
    """Pack the datasets that the cases need, and write the configuration of cases without a shipped configuration."""
    (folder / "runs").mkdir(parents=True)
    (folder / "tiny.yaml").write_text("run: runs/none\ndata: {url: data/rgb}\n")
    texts = [f"{case.overrides} {case.commands}" for case in cases]
    pictures.make(folder, texts, lambda arguments: commands.call(arguments, folder, folder / "pack.txt", fresh=fresh))


def record_all(cases: list[Case], folder: Path, out: Path, jobs: int, *, fresh: bool) -> list[str]:
    """Record cases in parallel, each in a separate process. Return the names of those that failed."""
    running: dict[int, str] = {}
    failed: list[str] = []

    def wait(limit: int) -> None:
        while len(running) > limit:
            process, status = os.wait()
            name = running.pop(process)
            failed.extend([name] if status else [])
            print(f"{name}: {'failed' if status else 'recorded'}", flush=True)

    for case in cases:
        if case.init:
            wait(0)  # waits for the run that it starts from
        child = os.fork()
        if not child:
            os._exit(_recorded(case, folder, out, fresh=fresh))
        running[child] = case.name
        wait(jobs - 1)
    wait(0)
    return failed


def _recorded(case: Case, folder: Path, out: Path, *, fresh: bool) -> int:
    """Record one case to its file. Return an exit code."""
    try:
        found = record(case, folder, fresh=fresh)
        (out / f"{case.name}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    except Exception as error:  # the other cases continue
        print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def compare(a: Path, b: Path, patterns: Iterable[str]) -> int:
    """Print the differences between two folders of recordings. Return the number of cases in which numbers differ."""
    names = sorted({path.stem for folder in (a, b) for path in folder.glob("*.json")})
    names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    differ = 0
    for name in names:
        one, two = (json.loads(p.read_text()) if (p := x / f"{name}.json").exists() else None for x in (a, b))
        if one is None or two is None:
            print(f"{name}: recorded in {a if two is None else b} only")
            differ += 1
            continue
        numbers, others = reading.differences(one, two)
        differ += bool(numbers)
        for title, lines in (("numbers differ", numbers), ("keys and descriptions differ", others)):
            if lines:
                print(f"{name}: {len(lines)} {title}", *lines, sep="\n    ")
    print(f"{len(names)} cases compared, numbers differ in {differ}")
    return differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the recordings, one JSON file for each case")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of cases, such as 'term-*'")
    parser.add_argument("--jobs", type=int, default=1, help="cases that are made at a time")
    parser.add_argument("--work", type=Path, help="new folder for datasets and runs, which is kept")
    parser.add_argument("--fresh", action="store_true", help="start a new interpreter for each command")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("FOLDER", "OTHER"))
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write what expected.json holds of the cases, too")
    given = parser.parse_args()
    if given.compare:
        a, b = given.compare
        return int(compare(a, b, given.only) > 0)
    cases = chosen(given.only)
    if given.list or not given.out or not cases:
        print(*(case.name for case in cases), sep="\n")
        return 0 if given.list else parser.error("--out FOLDER is needed, and --only must fit a case")
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.fresh:
        commands.import_libraries()
    with contextlib.ExitStack() as stack:
        work = given.work.resolve() if given.work else stack.enter_context(commands.temporary_folder())
        prepare(work, cases, fresh=given.fresh)
        failed = record_all(cases, work, given.out.resolve(), given.jobs, fresh=given.fresh)
    if given.summary and not failed:
        found = {case.name: json.loads((given.out / f"{case.name}.json").read_text()) for case in cases}
        given.summary.write_text(reading.compact({name: reading.summary(found[name]) for name in given.only}))
    if failed:
        print(f"{len(failed)} of {len(cases)} cases failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
