"""Train a decoder from a run's frozen embeddings to frames, and show sampled futures as pictures.

The run's own networks stay as they are. The decoder learns from the training clips: about two minutes on two cores.
A decoder that the run already holds is kept. Its weights and its errors on test clips are written to
decoder.safetensors and decoder.json in the run folder, and pictures of a few test clips to futures/: what the model
saw, what came, six sampled futures, and the mean and the spread of all samples, as animations (clip_1.webp) and side by
side (clip_1.png). `worldmodel evaluate` puts them into the report.

example:
  worldmodel decode --run runs/demo
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from data_pipelines.errors import UserError, one_line_logger
from worldmodel.commands.process import keep_freed_memory
from worldmodel.commands.shared import (
    add_data,
    add_overwrite,
    add_run,
    add_seed,
    check_counts,
    check_remote,
    check_seed,
    load_run,
)

if TYPE_CHECKING:
    from worldmodel.runs.metrics import DecoderFacts

log = one_line_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "a trained run on videos")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="updates of the decoder (default: 500)")
    parser.add_argument(
        "--clips", type=int, default=3000, metavar="N", help="training clips to embed, at most (default: 3000)"
    )
    add_seed(parser, "seed of the decoder")
    add_overwrite(parser, "the run's decoder")
    add_data(parser)


def run(args: argparse.Namespace) -> None:
    from worldmodel.evaluation.decoded import save_decoder, store_futures, stored_facts
    from worldmodel.report.decoded_pictures import write_futures
    from worldmodel.report.run_page import report_of_run
    from worldmodel.runs.folder import RunFolder
    from worldmodel.training.decoding import DecoderSettings, fit_decoder

    check_counts(args, "steps", "clips")
    check_seed(args)
    keep_freed_memory()
    trained = load_run(args)
    check_remote(trained.source.url, args.allow_remote)
    folder, step = RunFolder(trained.folder), trained.num_updates
    folder.check_writable()
    facts = None if args.overwrite else stored_facts(trained.folder, step)
    if facts is None:
        settings = DecoderSettings(args.steps, args.clips, args.seed)
        decoder, facts = fit_decoder(trained.networks, settings, step=step, horizon=trained.config.evaluation.horizon)
        save_decoder(trained.folder, decoder, facts)
    else:
        log.info("%s holds a decoder of this checkpoint: --overwrite trains it anew", trained.folder)
    futures = store_futures(trained.folder, trained.networks, trained.config, step)
    try:
        paths = write_futures(trained.folder, futures)
    except OSError as error:
        raise UserError(f"cannot write to {folder.futures}: {error.strerror}") from error
    if folder.metrics.is_file():
        paths.append(report_of_run(trained.folder))
    print(f"\n{table_of_errors(facts)}\n")
    print("\n".join(str(path) for path in [folder.decoder, *paths]))


def table_of_errors(facts: DecoderFacts) -> str:
    """Return the mean squared errors on test clips, and their ratios to that of the mean picture."""
    from worldmodel.report.headline import DECODER_ERRORS
    from worldmodel.report.numbers import number
    from worldmodel.runs.metrics import value_at

    errors = {name: value_at({"decoder": facts}, f"decoder.{key}") for key, name in DECODER_ERRORS.items()}
    mean = facts.get("mean_picture_mse") or float("nan")
    width = max(map(len, errors))
    lines = [f"{'mean squared error':<{width}}  {'value':>8}  {'of mean picture':>15}"]
    for name, error in errors.items():
        ratio = None if error is None else error / mean
        lines.append(f"{name:<{width}}  {number(error, 5):>8}  {number(ratio, 2):>15}")
    return "\n".join(lines)
