"""The grid of `worldmodel compare`: one config per objective, latent and seed, and the state of each run."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.errors import UserError
from worldmodel.config import Config, choices, load_config, to_dict
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import read_metrics, value_at
from worldmodel.runs.opening import lasting_changes, load_run_config

OPTIONS = {"objective.name": "--objectives", "model.latent": "--latents", "seed": "--seeds", "run_dir": "--out"}
"""The keys that the grid sets, and the option that sets each."""


@dataclass(frozen=True)
class GridRun:
    """One run of the grid."""

    objective: str
    latent: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.latent}/seed_{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def with_suffix(self, suffix: str) -> Path:
        """Return the path of a file alongside the folder, named after it."""
        return self.folder.with_name(self.folder.name + suffix)


def make_grid(args: argparse.Namespace) -> tuple[list[GridRun], str]:
    """Return all runs in the given order, and a line about the combinations that the config rejects, "" if none.

    Raises:
        UserError: the config rejects a combination and --skip-refused is not given, or it rejects all.
    """
    check_names(args)
    grid: list[GridRun] = []
    reasons: dict[str, list[str]] = {}
    for objective in dict.fromkeys(args.objectives):
        for latent in dict.fromkeys(args.latents):
            try:
                grid += [
                    GridRun(objective, latent, seed, run_config(args, objective, latent, seed))
                    for seed in dict.fromkeys(args.seeds)
                ]
            except UserError as error:
                reasons.setdefault(str(error), []).append(f"{objective}/{latent}")
    refused = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    if not grid:
        raise UserError(next(iter(reasons)) if len(reasons) == 1 else refused)
    if refused and not args.skip_refused:
        raise UserError(f"{refused} (--skip-refused leaves such combinations out)")
    return grid, refused


def check_names(args: argparse.Namespace) -> None:
    """Check the names of objectives and latents, and the overrides.

    Raises:
        UserError: the config does not have a name, or an override sets a key of the grid.
    """
    for option, names, allowed in (
        ("--objectives", args.objectives, choices("objective")),
        ("--latents", args.latents, choices("model.latent")),
    ):
        for name in names:
            if name not in allowed:
                raise UserError(f"{option} {name}: allowed are {', '.join(allowed)}")
    for setting in args.set:
        target, colon, override = setting.partition(":")
        objective, slash, latent = target.partition("/")
        if not colon or objective not in args.objectives or (slash and latent not in args.latents):
            raise UserError(
                f"--set {setting} must read OBJECTIVE[/LATENT]:key=value, with an objective and a latent of the grid"
            )
        check_not_of_grid(override)
    for override in args.overrides:
        check_not_of_grid(override)


def check_not_of_grid(override: str) -> None:
    """Check that an override leaves the keys of the grid alone.

    Raises:
        UserError: it does not.
    """
    key = override.partition("=")[0]
    if key in OPTIONS:
        raise UserError(f"override {override!r}: the grid sets {key}, use {OPTIONS[key]}")


def run_config(args: argparse.Namespace, objective: str, latent: str, seed: int) -> Config:
    """Return the config of one run: the base config, then overrides from the general to the particular.

    Their order: those for all runs, for the objective, for the objective with the latent, and the keys of the grid.

    Raises:
        UserError: the config rejects the combination.
    """
    settings = [setting.partition(":") for setting in args.set]
    return load_config(
        args.config,
        [
            *args.overrides,
            *(override for target, _, override in settings if target == objective),
            *(override for target, _, override in settings if target == f"{objective}/{latent}"),
            f"objective.name={objective}",
            f"model.latent={latent}",
            f"seed={seed}",
            f"run_dir={args.out / f'{objective}-{latent}' / f'seed_{seed}'}",
        ],
        trust_code=args.trust_code,
    )


def keep_threads(run: GridRun, share: int | None) -> GridRun:
    """Set the number of threads to `share` if the config leaves it open.

    A run that has begun keeps its number, so that --jobs may change in between.
    """
    if run.config.train.num_threads is not None:
        return run
    saved = saved_config(run)
    num_threads = share if saved is None else saved.train.num_threads
    train = dataclasses.replace(run.config.train, num_threads=num_threads)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))


def saved_config(run: GridRun) -> Config | None:
    """Return the config in the run's folder, None if the run has not begun."""
    return load_run_config(run.folder) if RunFolder(run.folder).config.is_file() else None


def changes_of(run: GridRun) -> list[str]:
    """Return the changes that prevent a resume with the grid's config, each as "key=before, now after"."""
    saved = saved_config(run)
    return [] if saved is None else lasting_changes(to_dict(saved), to_dict(run.config))


def check_same_configs(grid: Sequence[GridRun]) -> None:
    """Check that no folder of the grid holds a run of another config.

    Raises:
        UserError: one does.
    """
    stale = {run.name: changes for run in grid if (changes := changes_of(run))}
    if stale:
        name, changes = next(iter(stale.items()))
        others = f" (and {len(stale) - 1} more runs)" if len(stale) > 1 else ""
        raise UserError(
            f"{name} holds a run of another config: {'; '.join(changes)}{others}; "
            "use the same config, delete the run or choose another --out"
        )


def is_done(run: GridRun) -> bool:
    """Return whether the run is evaluated at its last step, with this config."""
    metrics = read_metrics(run.folder)
    train = run.config.train
    refine_steps = value_at(metrics, "train.refine_steps")  # of an earlier version: None
    is_last = value_at(metrics, "train.steps") == train.steps and refine_steps in (train.refine_steps, None)
    return is_last and not changes_of(run)
