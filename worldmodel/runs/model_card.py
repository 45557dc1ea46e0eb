"""The model card of an exported run: README.md with the front matter of the Hugging Face Hub."""

import json
from collections.abc import Sequence

import worldmodel
from data_pipelines.errors import printable
from worldmodel.config import Config, GaussianConfig, NoLatentConfig, PretrainedConfig, flatten, outside_names, to_dict
from worldmodel.report.numbers import duration, forecast_names, horizon, label, number, score, unit
from worldmodel.report.tables import aligned_table, column_digits, markdown_table
from worldmodel.runs.metrics import Metrics, value_at
from worldmodel.runs.trained_run import TrainedRun

FRONT_MATTER = """\
---
library_name: worldmodel
tags:
- world-model
- video
- self-supervised-learning
- forecasting
---
"""
# Settings of reading, which say nothing about the training data.
READING = {"cache_mb", "decode_timeout_s", "decoder", "max_bad_fraction", "num_workers", "pool_clips", "num_lanes"}
READING |= {"remote_cache_dir", "remote_cache_mb", "max_frame_px", "action_label", "batch_size"}


def model_card(
    run: TrainedRun, config: Config, metrics: Metrics | None, name: str, left_out: Sequence[str], has_decoder: bool
) -> str:
    """Return README.md of an exported run.

    config: of the exported folder. metrics: None if the run was not evaluated. name: the argument of `load`.
    """
    trust = ", trust_code=True" if outside_names(config) else ""
    sections = {
        "Load": f"```python\nimport worldmodel\n\nrun = worldmodel.load({json.dumps(name)}{trust})\n```",
        "Model": aligned_table([["property", "value"], *_facts(run, config)], num_left=2),
        "Scores": "The run was not evaluated at this checkpoint." if metrics is None else _scores(metrics),
        "Training data": aligned_table([["key", "value"], *_data(config)], num_left=2),
        "Limitations": _bullets(_limitations(config, has_decoder)),
        "Left out": _bullets([_plain(part) for part in left_out]),
        "License": "None is stated. Add `license:` to the first lines of this file.",
    }
    about = (
        "A world model: it encodes a clip, and samples the embeddings of its futures. Trained with the package "
        f"`worldmodel`, version {worldmodel.__version__}."
    )
    title = f"# {_plain(config.run_dir)}\n\n{about}"
    return "\n".join([FRONT_MATTER, title, *(f"\n## {head}\n\n{text}" for head, text in sections.items())]) + "\n"


def _facts(run: TrainedRun, config: Config) -> list[list[str]]:
    model, (channels, height, width) = config.model, run.frame_shape
    values = "uint8, or in [0, 1]" if run.source.content == "frames" else "of any values"
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    facts = {
        "input": f"clips [B, {config.data.num_frames}, {channels}, {height}, {width}], {values}",
        "embedding": f"{model.embedding_dim} dimensions",
        "encoder": model.encoder.name,
        "latent": f"{model.latent.name}, {run.model.latent.latent_dim} dimensions",
        "editor": model.editor.name,
        "action": f"{model.action_dim} numbers per frame" if model.action_dim else "none",
        "objective": config.objective.name,
        "parameters": number(parameters),
        "training": f"{number(run.state['step'])} steps, {duration(run.state['train_seconds'])}",
    }
    if run.refine_steps:
        facts["refinement"] = f"{number(run.refine_steps)} steps"
    return [[key, _plain(value)] for key, value in facts.items()]


def _scores(metrics: Metrics) -> str:
    """Return the table of forecasts with its explanation, or that of known factors."""
    if metrics.get("factors") is not None:
        rows = [
            ["R² of the known factors", "score"],
            ["in distribution", number(value_at(metrics, "factors.in_distribution_r2"))],
            ["out of distribution", number(value_at(metrics, "factors.out_of_distribution_r2"))],
        ]
        return aligned_table(rows)
    about = (
        f"Forecasts of {number(metrics.get('queries'))} clips of the test split, {number(metrics.get('num_samples'))} "
        f"samples each. The Energy Score is in {_plain(unit(metrics))}; lower is better. Climatology uses the futures "
        "of other clips and ignores the context. An oracle, where there is one, knows the true law. `metrics.json` "
        "has all scores."
    )
    tables = [about, markdown_table(metrics).replace("<", "&lt;")]
    if unit(metrics) != "embedding space" and value_at(metrics, "embedding.forecasts"):
        tables.append(_embedding_table(metrics))
    return "\n\n".join(tables)


def _embedding_table(metrics: Metrics) -> str:
    """Return the Energy Scores in embedding space, in which every run has a climatology."""
    folder, steps = "embedding.forecasts", range(horizon(metrics))
    digits = [column_digits(metrics, f"energy_score.{step}", 3, folder) for step in steps]
    rows = [
        [label(name), *(number(score(metrics, name, step, folder), digits[step]) for step in steps)]
        for name in forecast_names(metrics, folder)
    ]
    return aligned_table([["Energy Score, embedding space", *(f"h = {step + 1}" for step in steps)], *rows])


def _data(config: Config) -> list[list[str]]:
    flat = flatten(to_dict(config)["data"])
    rows = [[f"data.{key}", _plain(value)] for key, value in flat.items() if key not in READING and value is not None]
    return rows + ([["train.start_from", _plain(config.train.start_from)]] if config.train.start_from else [])


def _limitations(config: Config, has_decoder: bool) -> list[str]:
    start = config.train.start_from
    found = [
        "It predicts embeddings. A small decoder, trained on embeddings of real frames, draws frames from them."
        if has_decoder
        else "It predicts embeddings, not frames.",
        "It was trained on the data above alone"
        + (f", after its weights were trained in {_plain(start)} on the data of that run" if start else "")
        + ". The scores hold for the test split of this data, and for no other videos.",
        f"Forecasts beyond horizon {config.evaluation.horizon}, in segments, were not scored.",
    ]
    if isinstance(config.model.latent, NoLatentConfig):
        found.append("It has no latent variable: all samples of a future are equal.")
    if isinstance(config.model.latent, GaussianConfig):
        found.append("Sampled futures are as varied as those of the training data, which may miss rare events.")
    if isinstance(config.model.encoder, PretrainedConfig):
        found.append(f"Loading needs the model of `model.encoder.path`: {_plain(config.model.encoder.path)}.")
    if outside := outside_names(config):
        found.append(f"Loading needs code that is not part of the package: {_plain(', '.join(outside.values()))}.")
    return found


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(value: object) -> str:
    """Return text of a config or of metrics as Markdown shows it: one line, without markup."""
    text = printable(value)
    return "".join(f"\\{c}" if c in "\\`*_[]<>#" else c for c in text)
