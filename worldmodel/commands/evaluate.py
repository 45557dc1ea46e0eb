"""Score the forecasts of a run. Write metrics.json, forecasts.md and report.html into its folder.

examples:
  worldmodel evaluate --run runs/demo
  worldmodel evaluate --run runs/demo --compare runs/demo_byol
"""

import argparse
from pathlib import Path

from worldmodel.commands.process import keep_freed_memory
from worldmodel.commands.shared import (
    add_data,
    add_run,
    check_remote,
    load_run,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--compare", type=Path, metavar="FOLDER", help="an evaluated run without a latent variable, shown as a control"
    )
    add_data(parser)


def run(args: argparse.Namespace) -> None:
    from worldmodel.evaluation.evaluate import evaluate
    from worldmodel.evaluation.factors import factors_table
    from worldmodel.report.headline import verdict
    from worldmodel.report.run_page import report_of_run
    from worldmodel.report.tables import markdown_table
    from worldmodel.runs.folder import RunFolder

    keep_freed_memory()
    trained = load_run(args)
    check_remote(trained.source.url, args.allow_remote)
    metrics = evaluate(trained, compare=args.compare)
    if "factors" in metrics:
        print(f"\n{factors_table(metrics)}\n")
    else:
        print(f"{verdict(metrics)}\n\n{markdown_table(metrics)}\n\n{report_of_run(args.run)}")
    print(RunFolder(args.run).metrics)
