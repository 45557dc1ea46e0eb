"""Score the forecasts of a run on the world of commands against its law, for seen and for unseen combinations.

python benchmarks/two_outcomes.py --run runs/commands

Fresh states and commands are drawn. The law of the step after each is known: two places, with their probabilities. So
scores are expectations over both outcomes:

    energy score     of embeddings: the run's samples, the mean of these samples as a single forecast, persistence,
                     and the law itself, which is p (1 - p) d for outcomes d apart
    Brier score      of the share of samples that are nearer to the first outcome: the run's, that of the average
                     probability of seen states, and the law's, which is the mean of p (1 - p). That of the run is the
                     fair score, an estimate of what infinitely many samples would have (Ferro 2014, "Fair scores for
                     ensemble forecasts"): samples of the law have the law's score, however few they are

Prints a table and writes two_outcomes.json into the run's folder.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.worlds.commands import (
    COMMANDS,
    HIGH_PX,
    LOW_PX,
    Combinations,
    draw,
    outcomes,
    probability,
    things_of,
)
from worldmodel import TrainedRun, load
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import check_counts, check_seed, write_result
from worldmodel.evaluation.scores import energy_score
from worldmodel.runs.folder import RunFolder

KINDS: tuple[Combinations, ...] = ("seen", "unseen")


class Queries(NamedTuple):
    """Q states with a command each, as float32.

    frames [Q, 1, 3, H, W] of the states in [0, 1], one-hot actions [Q, 1, A], outcomes [Q, 2, 3, H, W] as frames, and
    the probability [Q] of the first.
    """

    frames: Tensor
    actions: Tensor
    outcomes: Tensor
    probability: Tensor


def draw_queries(combinations: Combinations, count: int, seed: int) -> Queries:
    """Draw objects, places and commands uniformly."""
    rng = np.random.default_rng(seed)
    things = things_of(combinations)
    chosen = [things[index] for index in rng.integers(len(things), size=count)]
    places = rng.uniform(LOW_PX, HIGH_PX, (count, 2))
    commands = rng.integers(len(COMMANDS), size=count)
    following = outcomes(places, commands)
    now, one, other = (
        torch.from_numpy(np.stack([draw(place, thing) for place, thing in zip(at, chosen, strict=True)]))
        for at in (places, following[:, 0], following[:, 1])
    )
    return Queries(
        now.permute(0, 3, 1, 2)[:, None] / 255,
        F.one_hot(torch.from_numpy(commands), len(COMMANDS)).float()[:, None],
        torch.stack([one, other], dim=1).permute(0, 1, 4, 2, 3) / 255,
        torch.from_numpy(probability(places, np.array([thing.size for thing in chosen]))).float(),
    )


@torch.no_grad()
def score(run: TrainedRun, queries: Queries, num_samples: int, base_rate: float, seed: int) -> dict[str, float]:
    """Return the scores of a run. base_rate: the probability that the baseline of the Brier score always states."""
    samples = run.rollout(queries.frames, 1, num_samples, seed, actions=queries.actions)[:, :, 0].cpu()
    encode = run.target_encoder
    now = encode(queries.frames.to(run.device)).cpu()
    both = encode(queries.outcomes.flatten(0, 1)[:, None].to(run.device)).cpu().unflatten(0, (-1, 2))
    return scores_of(samples, now, both, queries.probability, base_rate)


def scores_of(samples: Tensor, now: Tensor, both: Tensor, probability: Tensor, base_rate: float) -> dict[str, float]:
    """Return the scores of samples [Q, S, D] for outcomes [Q, 2, D] of states [Q, D], the first of probability [Q].

    brier_model is the fair score: the variance of the share of S samples, estimated without bias, is subtracted from
    its squared error. For a single sample it is not known, and nothing is subtracted.
    """
    weights = torch.stack([probability, 1 - probability], dim=1)

    def expected(forecasts: Tensor) -> float:
        of_outcomes = torch.stack([energy_score(forecasts, both[:, [outcome]]) for outcome in (0, 1)], dim=1)
        return float((weights * of_outcomes).sum(dim=1).mean())

    variance = probability * (1 - probability)
    apart = torch.linalg.vector_norm(samples[:, :, None] - both[:, None], dim=-1)
    share, num_samples = (apart[..., 0] < apart[..., 1]).float().mean(dim=1), samples.shape[1]
    of_share = share * (1 - share) / max(1, num_samples - 1)  # 0 for a single sample
    return {
        "law": float((variance * torch.linalg.vector_norm(both[:, 0] - both[:, 1], dim=-1)).mean()),
        "model": expected(samples),
        "mean_of_samples": expected(samples.mean(dim=1, keepdim=True)),
        "persistence": expected(now[:, None]),
        "brier_law": float(variance.mean()),
        "brier_model": float((variance + (share - probability).square() - of_share).mean()),
        "brier_base_rate": float((variance + (base_rate - probability).square()).mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run trained on the world of commands")
    parser.add_argument("--queries", type=int, default=1024, help="states of each kind (default: 1024)")
    parser.add_argument("--samples", type=int, default=64, help="sampled futures of each (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "queries", "samples")
        check_seed(args)
        run = load(args.run)
        folder = RunFolder(args.run)
        folder.check_writable()
        drawn = {kind: draw_queries(kind, args.queries, args.seed + number) for number, kind in enumerate(KINDS)}
        base_rate = float(drawn["seen"].probability.mean())
        found: dict[str, dict[str, float]] = {
            kind: score(run, queries, args.samples, base_rate, args.seed) for kind, queries in drawn.items()
        }
        facts = {"queries": args.queries, "samples": args.samples, "seed": args.seed, "step": run.num_updates}
        write_result(folder.two_outcomes, facts | found)
        print(f"\n{table(found)}\n\n{folder.two_outcomes}")
    return 0


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the scores as a table, with the energy scores also as multiples of the law's."""
    lines = [f"{'':<34}" + "".join(f"{kind:>20}" for kind in found)]
    for name in found["seen"]:
        cells = []
        for scores in found.values():
            times = "" if name.startswith("brier") else f" ({scores[name] / scores['law']:.2f} x)"
            cells.append(f"{scores[name]:.4f}{times}")
        title = name.replace("_", " ") if name.startswith("brier") else f"energy score, {name.replace('_', ' ')}"
        lines.append(f"{title:<34}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
