"""``python -m benchmarks``: runs the suite, prints a table, writes JSON and plots."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import machine, measure, memory, report, roofs, suite, table, threads, workload

THREAD_CASES = 4  # of each op the first, which have targets


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m benchmarks", description="What nsk reaches here, next to its peers.")
    p.add_argument("--quick", action="store_true", help="a selection of the cases, within two minutes")
    p.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="cases whose op is TEXT or whose name contains it; may be repeated",
    )
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    p.add_argument("--threads", type=int, metavar="N", help="threads of nsk and torch (default: torch's own choice)")
    p.add_argument("--seconds", type=float, default=4.0, metavar="S", help="time to measure a case (default: 4)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    p.add_argument("--report", type=Path, metavar="DIR", help="write table, JSON and plots to DIR")
    return p


def chosen(args: argparse.Namespace) -> list[workload.Case]:
    """The cases that the command line asks for."""
    cases = workload.all_cases()
    if args.only:
        return [case for case in cases if any(text == case.op or text in case.name for text in args.only)]
    return _in_turn([case for case in cases if case.quick]) if args.quick else cases


def _in_turn(cases: list[workload.Case]) -> list[workload.Case]:
    """A case of each op in turn: where time runs out, every op has had its first."""
    by_op = ([case for case in cases if case.op == op] for op in workload.OPS)
    return [case for turn in itertools.zip_longest(*by_op) for case in turn if case]


def scaling(cases: list[workload.Case]) -> list[workload.Case]:
    """The cases whose use of many threads is compared with that of one."""
    aimed = [case for case in cases if case.target and case.dtype == "float32"]
    return [case for op in workload.OPS for case in [c for c in aimed if c.op == op][:THREAD_CASES]]


def main(argv: list[str]) -> int:
    """Returns 0, or 1 when a result was wrong, or 2 when no case has the name asked for."""
    args = parser().parse_args(argv)
    cases = chosen(args)
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not cases:
        print("no case has such a name; --list prints them", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    count = torch.get_num_threads()
    kept = memory.keep_freed()
    plan = suite.quick_plan(count) if args.quick else suite.Plan(count, measure.Effort(seconds=args.seconds))
    run = {"machine": machine.describe(count, argv) | {"freed_memory_kept": kept}, "rows": [], "threads": []}
    print(machine.line(run["machine"]))

    roof = roofs.Roofs(count)
    with tqdm(total=len(cases), unit="case", disable=None) as bar:
        for row in suite.run(cases, plan, roof, bar.set_postfix_str):
            run["rows"].append(row)
            run["roofs"] = roof.as_json()
            _save(args.json, run)  # a long run that is cut short leaves what it found
            bar.update()
    run["rows"].sort(key=lambda row: workload.OPS.index(row["op"]))
    for row in run["rows"]:
        suite.finish(row, roof)
    if count > 1 and not args.quick and not args.only:
        turns = tqdm(scaling(cases), "threads", unit="case", disable=None)
        run["threads"] = [threads.efficiency(case, plan.effort, count) for case in turns]

    print("", table.text(run["rows"]), table.legend(run["rows"]), sep="\n")
    print("", table.roofs_text(run["roofs"], count), *roofs.notes(), sep="\n")
    for more in (table.kept_text(run["rows"]), table.absent_text(run["rows"]), table.threads_text(run["threads"])):
        if more:
            print(more)
    _save(args.json, run)
    if args.report:
        print("wrote", *report.write(args.report, run))
    refused = [row["name"] for row in run["rows"] if row["status"] == "refused"]
    if refused:
        print("wrong results, not timed:", ", ".join(refused), file=sys.stderr)
    return 1 if refused else 0


def _save(file: Path | None, run: dict) -> None:
    if file:
        file.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
