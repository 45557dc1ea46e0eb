"""The world model: encode a past, infer or sample r, edit the embedding into a future's, roll that out.

Legend: B clips, T frames, C channels, H = W pixels, D embedding dimensions, R latent dimensions, S samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.checkpoint import load_checkpoint, load_run_config
from worldmodel.config import Config, DataConfig, ModelConfig
from worldmodel.editors import MlpEditor
from worldmodel.encoders import ENCODERS, Embedder
from worldmodel.latents import GaussianLatent, kl_divergence
from worldmodel.objectives import negative_cosine
from worldmodel.teacher import Teacher


class WorldModel(nn.Module):
    """AdaSSL-V with a distillation objective (arXiv 2602.02381); without a latent it is BYOL (arXiv 2006.07733)."""

    def __init__(self, model: ModelConfig, data: DataConfig) -> None:
        super().__init__()
        encoder = ENCODERS[model.encoder](data.channels, data.num_frames, model.width)
        self.embedder = Embedder(encoder, model.hidden_dim, model.embedding_dim)
        self.latent = (
            GaussianLatent(model.embedding_dim, model.hidden_dim, model.latent_dim, model.prior_components)
            if model.latent == "gaussian"
            else None
        )
        latent_dim = self.latent.latent_dim if self.latent else 0
        self.editor = MlpEditor(model.embedding_dim, model.hidden_dim, latent_dim)

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, C, H, W] in [0, 1] -> embedding [B, D] of length sqrt(D)."""
        return self.embedder(video)

    def infer(self, context: Tensor, later: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings of x and x++ [B, D] -> a draw r [B, R] of the posterior, KL(posterior || prior) [B] in nats."""
        if self.latent is None:
            return context[:, :0], context.new_zeros(len(context))
        posterior = self.latent.posterior(context, later)
        r = posterior.draw(generator)
        return r, kl_divergence(posterior, self.latent.prior(context), r)

    def sample(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """context [B, D] -> one draw r [B, R] from the prior for each row."""
        if self.latent is None:
            return context[:, :0]
        return self.latent.prior(context).draw(generator)

    def edit(self, context: Tensor, r: Tensor) -> Tensor:
        """context [B, D], r [B, R] -> embedding [B, D] of the next segment."""
        return self.editor(context, r)

    def prior_mean_forecast(self, context: Tensor) -> Tensor:
        """context [B, D] -> the one future [B, D] at the mean of the prior."""
        r = self.latent.prior(context).mean if self.latent else context[:, :0]
        return self.edit(context, r)

    def rollout_embedding(
        self, context: Tensor, horizon: int, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Futures of an embedding, each step from a fresh draw of the prior: [B, D] -> [B, S, horizon, D]."""
        state = repeat(context, "b d -> (b s) d", s=num_samples)
        steps = []
        for _ in range(horizon):
            state = self.edit(state, self.sample(state, generator))
            steps.append(state)
        return rearrange(torch.stack(steps, dim=1), "(b s) h d -> b s h d", s=num_samples)

    def rollout(self, x: Tensor, horizon: int, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Sampled futures of a clip: x [B, T, C, H, W] in [0, 1] -> embeddings [B, S, horizon, D]."""
        return self.rollout_embedding(self.encode(x), horizon, num_samples, generator)

    def forward(
        self, x: Tensor, later: Tensor, target: Tensor, beta: float, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The training losses, all scalars; "loss" is the one to minimise.

        x and later [B, T, C, H, W] are the segments x and x++; target [B, D] is the teacher's embedding of x+. The
        encoder also learns through the posterior: without that gradient, forecasts are far worse
        (docs/experiments.md).
        """
        if self.latent is None:
            context = self.encode(x)
            prediction_loss = negative_cosine(self.edit(context, context[:, :0]), target)
            return {"loss": prediction_loss, "prediction_loss": prediction_loss.detach()}
        context, later_embedding = self.encode(torch.cat([x, later])).chunk(2)
        r, kl_per_clip = self.infer(context, later_embedding, generator)
        kl = kl_per_clip.mean()
        prediction_loss = negative_cosine(self.edit(context, r), target)
        return {
            "loss": prediction_loss + beta * kl,
            "prediction_loss": prediction_loss.detach(),
            "kl_nats": kl.detach(),
        }


@dataclass(frozen=True)
class TrainedRun:
    """A run's config, its networks in evaluation mode, and the state of the checkpoint they came from."""

    config: Config
    model: WorldModel
    teacher: Teacher
    state: dict[str, Any]


def load(
    run: str | Path, *, which: Literal["latest", "best"] = "latest", device: str | torch.device = "cpu"
) -> TrainedRun:
    """Load a run folder.

    Raises:
        UserError: no run is there, it has no checkpoint yet, or the checkpoint is damaged.
    """
    config = load_run_config(run)
    checkpoint = load_checkpoint(Path(run), which)
    if checkpoint is None:
        raise UserError(f"the run {run} has no checkpoint yet: train it first")
    model = WorldModel(config.model, config.data)
    teacher = Teacher(model.embedder)
    model.load_state_dict(checkpoint.model)
    teacher.load_state_dict(checkpoint.teacher)
    return TrainedRun(config, model.to(device).eval(), teacher.to(device), checkpoint.state)
