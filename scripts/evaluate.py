"""Score a trained run's forecasts; write metrics.json, forecasts.md and report.html into its folder.

python scripts/evaluate.py --run runs/demo [--compare runs/demo_byol]
"""

import argparse
import sys
from pathlib import Path

import torch

from worldmodel import load
from worldmodel.commands.process import keep_freed_memory
from worldmodel.commands.shared import add_allow_remote, check_device, check_remote, report_errors
from worldmodel.evaluation.evaluate import evaluate
from worldmodel.evaluation.factors import factors_table
from worldmodel.report.run_page import report_of_run
from worldmodel.report.tables import markdown_table
from worldmodel.runs.folder import RunFolder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--checkpoint", choices=["latest", "best"], default="latest")
    parser.add_argument("--compare", type=Path, help="an evaluated run without a latent, shown as a control")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_allow_remote(parser)
    args = parser.parse_args()
    keep_freed_memory()
    with report_errors():
        run = load(args.run, which=args.checkpoint, device=check_device(args.device))
        check_remote(run.source.url, args.allow_remote)
        metrics = evaluate(run, compare=args.compare)
        if "factors" in metrics:
            print(f"\n{factors_table(metrics)}\n")
        else:
            print(f"\n{markdown_table(metrics)}\n\n{report_of_run(args.run)}")
        print(RunFolder(args.run).metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main())
