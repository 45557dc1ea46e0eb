"""The world model: encode a past, infer or sample r, edit the embedding into a future's, roll that out.

Legend: B clips, T frames, C channels, H = W pixels, D embedding dimensions, R latent dimensions, S samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.checkpoint import load_checkpoint, load_run_config
from worldmodel.config import Config
from worldmodel.data import Segments
from worldmodel.editors import make_editor
from worldmodel.encoders import ENCODERS, Embedder, normalise
from worldmodel.latents import Inference, make_latent
from worldmodel.objectives import make_objective
from worldmodel.teacher import Teacher


class WorldModel(nn.Module):
    """A joint-embedding predictor with any latent, editor and objective (AdaSSL, arXiv 2602.02381).

    L = L_ssl(t(f(x), r), f(x+)) + beta * L_reg(r). A Gaussian latent with the BYOL objective is AdaSSL-V as that
    paper's appendix D.5 has it; the same without a latent is BYOL (arXiv 2006.07733).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, data, objective = config.model, config.data, config.objective
        encoder = ENCODERS[model.encoder](data.channels, data.num_frames, model.width)
        self.embedder = Embedder(
            encoder, [model.hidden_dim] * model.projector_layers, model.embedding_dim, model.embedding_norm
        )
        self.latent = make_latent(
            model.latent,
            embedding_dim=model.embedding_dim,
            hidden_dim=model.hidden_dim,
            latent_dim=model.latent_dim,
            prior=model.prior,
            prior_components=model.prior_components,
        )
        self.objective = make_objective(
            objective.name,
            embedding_dim=model.embedding_dim,
            hidden_dim=model.hidden_dim,
            temperature=objective.temperature,
            sigreg_weight=objective.sigreg_weight,
        )
        self.editor = make_editor(
            model.editor,
            embedding_dim=model.embedding_dim,
            hidden_dim=model.hidden_dim,
            latent_dim=self.latent.latent_dim if self.latent else 0,
            predictor=self.objective.needs_predictor,
        )
        self.on_sphere = model.embedding_norm == "sphere"
        self.third_view: Literal["later", "target"] = "target" if data.num_segments == 2 else model.posterior_sees

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, C, H, W] in [0, 1] -> embedding [B, D], normalised as model.embedding_norm says."""
        return self.embedder(video)

    def infer(
        self, context: Tensor, segments: Segments, known_r: Tensor | None, generator: torch.Generator | None = None
    ) -> Inference:
        """What training saw of clips whose context f(x) [B, D] is known: r [B, R], R = 0 without a latent."""
        if self.latent is None:
            return Inference(context[:, :0], None, None)
        seen = self.encode(getattr(segments, self.third_view)) if self.latent.sees_later else None
        return self.latent.infer(context, seen, known_r, generator)

    def sample(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """context [B, D] -> one draw r [B, R] from the prior for each row."""
        if self.latent is None:
            return context[:, :0]
        return self.latent.prior(context).draw(generator)

    def edit(self, context: Tensor, r: Tensor) -> Tensor:
        """context [B, D], r [B, R] -> embedding float32 [B, D] of the next segment, normalised as the encoder's are."""
        edited = self.editor(context, r).float()
        return normalise(edited) if self.on_sphere else edited

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
        self,
        segments: Segments,
        teacher_target: Tensor | None,
        known_r: Tensor | None,
        beta: float,
        generator: torch.Generator | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The training losses, all scalars, of which "loss" is the one to minimise; and the targets [B, D] they saw.

        teacher_target [B, D] is the teacher's embedding of x+; without one the target is the encoder's own. known_r
        [B, R] is what an oracle latent takes. The encoder also learns through the posterior: without that gradient,
        forecasts are far worse (docs/experiments.md).
        """
        clips = {"x": segments.x}
        if teacher_target is None:
            clips["target"] = segments.target
        if self.latent is not None and self.latent.sees_later:
            clips[self.third_view] = getattr(segments, self.third_view)
        # One call for all: batch statistics over all segments, and one pass through the encoder.
        embeddings = dict(zip(clips, self.encode(torch.cat(list(clips.values()))).chunk(len(clips)), strict=True))
        context = embeddings["x"]
        target = embeddings["target"] if teacher_target is None else teacher_target
        r, penalty, nll = context[:, :0], None, None
        if self.latent is not None:
            r, penalty, nll = self.latent.infer(context, embeddings.get(self.third_view), known_r, generator)
        edited = self.edit(context, r)
        with torch.autocast(context.device.type, enabled=False):
            terms = self.objective(edited, target, context, generator)
        loss = terms["prediction_loss"]
        terms["alignment"] = F.cosine_similarity(edited, target, dim=-1).mean()
        if penalty is not None:
            assert self.latent is not None and self.latent.penalty_name is not None
            loss = loss + beta * penalty.mean()
            terms[self.latent.penalty_name] = penalty.mean()
        if nll is not None:
            loss = loss + nll.mean()
            terms["prior_nll_nats"] = nll.mean()
        if "information_nats" in terms and "kl_nats" in terms:
            # I(f(x); f(x+)) = I(f(x), r; f(x+)) - I(r; f(x+) | f(x)), and the KL bounds the second term from above.
            terms["information_nats"] = terms["information_nats"] - terms["kl_nats"]
        return {"loss": loss} | {name: value.detach() for name, value in terms.items()}, target.detach()


@dataclass(frozen=True)
class TrainedRun:
    """A run's config, its networks in evaluation mode, and the state of the checkpoint they came from."""

    config: Config
    model: WorldModel
    teacher: Teacher | None
    """None where the objective has no teacher."""
    state: dict[str, Any]

    @property
    def target_encoder(self) -> nn.Module:
        """What embeds targets: clip [B, T, C, H, W] -> [B, D]."""
        return self.teacher or self.model.embedder


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
    model = WorldModel(config)
    model.load_state_dict(checkpoint.model)
    teacher = None
    if model.objective.needs_teacher:
        teacher = Teacher(model.embedder)
        teacher.load_state_dict(checkpoint.teacher)
        teacher = teacher.to(device)
    return TrainedRun(config, model.to(device).eval(), teacher, checkpoint.state)
