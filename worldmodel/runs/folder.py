"""The names of all files in a run folder.

run/config.yaml                  the resolved config
run/metrics.jsonl                one row per log or evaluation during training
run/videos.jsonl                 hashes of the videos and labels, compared on a resume
run/.lock                        process and host that train the run now
run/checkpoints/index.json       names of the latest, the best and all kept checkpoints
run/checkpoints/step_00001000/   model, teacher, optimizer (.safetensors), state.json
run/profile/, run/wandb/         a profile of training; files of wandb
run/metrics.json                 scores of the evaluation
run/forecasts.md                 the forecasts in metrics.json as a Markdown table
run/readout.safetensors          the ridge readout that the evaluation chose
run/recalibration.safetensors    how the evaluation recalibrates forecasts, with the climatology for it
run/surprise.safetensors         the surprise and the motion of selection clips, with which videos are compared
run/illustrations.safetensors    arrays for the pictures of the report
run/decoder.safetensors          a decoder from embeddings to frames
run/decoder.json                 its training and its errors
run/decoded.safetensors          decoded futures for the pictures of the report
run/futures/                     the same as files: .webp animations and .png stills
run/planning.json                success rates of planning, with its protocol
run/planning.safetensors         the planned episodes that the report shows
run/goal_policy.safetensors      a goal-conditioned policy, and what it was fitted to
run/influence.safetensors        projected gradients of the training clips' losses
run/surprise_events.json         how well surprise detects planted events
run/few_labels.json              accuracy of classifiers from few labels
run/two_outcomes.json            forecasts of the world of commands, against its law
run/report.html                  the report
"""

from pathlib import Path

from data_pipelines.errors import UserError
from data_pipelines.files import check_writable


class RunFolder:
    """Paths of the files in the run folder `path`. The files need not exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.history = self.path / "metrics.jsonl"
        self.contents = self.path / "videos.jsonl"
        self.lock = self.path / ".lock"
        self.checkpoints = self.path / "checkpoints"
        self.checkpoint_index = self.checkpoints / "index.json"
        self.profile = self.path / "profile"
        self.wandb = self.path / "wandb"
        self.metrics = self.path / "metrics.json"
        self.forecasts = self.path / "forecasts.md"
        self.readout = self.path / "readout.safetensors"
        self.recalibration = self.path / "recalibration.safetensors"
        self.surprise = self.path / "surprise.safetensors"
        self.illustrations = self.path / "illustrations.safetensors"
        self.decoder = self.path / "decoder.safetensors"
        self.decoder_facts = self.path / "decoder.json"
        self.decoded = self.path / "decoded.safetensors"
        self.futures = self.path / "futures"
        self.planning = self.path / "planning.json"
        self.planned_episodes = self.path / "planning.safetensors"
        self.goal_policy = self.path / "goal_policy.safetensors"
        self.influence = self.path / "influence.safetensors"
        self.surprise_events = self.path / "surprise_events.json"
        self.few_labels = self.path / "few_labels.json"
        self.two_outcomes = self.path / "two_outcomes.json"
        self.report = self.path / "report.html"

    @property
    def files(self) -> frozenset[Path]:
        """All files that a run may hold at the top level, except the lock."""
        training = {self.config, self.history, self.contents}
        evaluation = {self.metrics, self.forecasts, self.readout, self.recalibration, self.surprise, self.illustrations}
        decoding = {self.decoder, self.decoder_facts, self.decoded}
        planning = {self.planning, self.planned_episodes, self.goal_policy}
        benchmarks = {self.surprise_events, self.few_labels, self.two_outcomes}
        return frozenset(training | evaluation | decoding | planning | benchmarks | {self.influence, self.report})

    @property
    def folders(self) -> frozenset[Path]:
        """All folders that a run may hold."""
        return frozenset({self.checkpoints, self.profile, self.wandb, self.futures})

    def check_writable(self) -> None:
        """Raise UserError if no file can be written into the folder, before hours of work depend on it."""
        try:
            check_writable(self.path)
        except OSError as error:
            raise UserError(f"cannot write into {self.path}: {error.strerror or error}") from error
