"""The world model: encode a past, infer or sample r, edit the embedding into a future's, roll that out.

A future is predicted from a state: the embedding of the past and, where the model has one, a scene code, which is read
from the same features, is no target of any prediction, and stays as it is while the embedding is edited on and on.

An action, where the model is conditioned on them, is what an agent did from the last frame of one segment to that of
the next: the actions at its frames, one after the other.

Legend: B clips, T frames, C channels, H = W pixels, F features, D embedding dimensions, Z numbers of a scene code (0
without it), R latent dimensions, A numbers of an action (0 without actions), S samples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.config import Config, External, GaussianConfig, SparseConfig, outside_names
from worldmodel.nets.distance import STEP_WEIGHT, TemporalDistance, excess_steps, nearness
from worldmodel.nets.editors import make_editor
from worldmodel.nets.encoders import Embedder, make_encoder, normalise
from worldmodel.nets.latents import Inference, make_latent
from worldmodel.nets.scene import SceneCode
from worldmodel.training.distributed import gathered, shared
from worldmodel.training.objectives import OBJECTIVES, SequenceTerms, make_objective


class Pairs(NamedTuple):
    """P pairs of segments of clips alike, the first and the second of each, whose distance in steps is to be as large
    as it can be: embeddings [2, P, D] and features [2, P, F], None where no scene code is read."""

    embeddings: Tensor
    features: Tensor | None


class Embedded(NamedTuple):
    """What the losses of a batch are computed from.

    real [B, K + 1, D] are the embeddings of the context and of the K targets; seen [B, K, D] those that the posterior
    sees, or None. features [B, F] are what the encoder made of the segment that the scene code is read from, None where
    none is read, and age [B] how many steps that segment is before the context; None for the context itself.
    other_features [B, F] are of any segment of each clip, and pairs what a temporal distance is learned from, both None
    where none is learned.
    """

    real: Tensor
    seen: Tensor | None
    features: Tensor | None
    age: Tensor | None
    other_features: Tensor | None = None
    pairs: Pairs | None = None


class Predictions(NamedTuple):
    """What was predicted for clips in K steps, and what a batch's losses are computed from.

    real [B, K + 1, D] are the embeddings of the context and of the K targets, edited [B, K, D] the predicted ones,
    penalty and nll [B, K] what r costs or None, actions [B, K, A] or None.
    """

    real: Tensor
    edited: Tensor
    penalty: Tensor | None = None
    nll: Tensor | None = None
    actions: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """[K * B, D], step by step, without gradient."""
        return step_by_step(self.real[:, 1:].detach())

    def of_all_processes(self) -> "Predictions":
        """Those of the global batch, brought together at once."""
        if not shared():
            return self
        parts = [part for part in self if part is not None]
        together = gathered(torch.cat([part.flatten(1) for part in parts], dim=1))
        split = iter(together.split([part[0].numel() for part in parts], dim=1))
        return self.map(lambda part: next(split).unflatten(1, part.shape[1:]))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Predictions":
        """The same of each that is there, in order."""
        rest = (None if values is None else change(values) for values in self[2:])
        return Predictions(change(self.real), change(self.edited), *rest)


class PredictionGradient(NamedTuple):
    """The gradient of a batch's loss by a share of its predictions, and by the parameters of the loss itself (pairs of
    parameter and gradient)."""

    predictions: Predictions
    parameters: Sequence[tuple[Tensor, Tensor]]

    def surrogate(self, predictions: Predictions) -> Tensor:
        """A number that has this gradient."""
        pairs = [*zip(predictions, self.predictions, strict=True), *self.parameters]
        terms = [(value * slope).sum() for value, slope in pairs if value is not None and slope is not None]
        return torch.stack(terms).sum()


class WorldModel(nn.Module):
    """A joint-embedding predictor with any latent, editor and objective (AdaSSL, arXiv 2602.02381).

    L = L_ssl(t(f(x), r), f(x+)) + beta * L_reg(r). A Gaussian latent with the BYOL objective is AdaSSL-V as that
    paper's appendix D.5 has it; the same without a latent is BYOL (arXiv 2006.07733).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, data, objective = config.model, config.data, config.objective
        for key, name in outside_names(config).items():
            raise UserError(f"{key}={name}: code from outside of the project cannot be loaded")
        assert not isinstance(model.editor, External)
        encoder = make_encoder(model.encoder, data)
        self.embedder = Embedder(
            encoder,
            [model.hidden_dim] * model.projector_layers,
            model.embedding_dim,
            model.embedding_norm,
            # A teacher's targets would shrink with it.
            learned_scale=model.embedding_norm == "sphere" or not OBJECTIVES[objective.name].needs_teacher,
        )
        self.scene = (
            SceneCode(encoder.num_features, model.hidden_dim, model.scene_dim, model.editor.norm)
            if model.scene_dim
            else None
        )
        scene_dim = self.scene.num_values if self.scene else 0
        self.embedding_dim = model.embedding_dim
        self.action_dim = model.action_dim * data.num_frames
        self.latent = make_latent(
            model.latent,
            context_dim=model.embedding_dim + scene_dim + self.action_dim,
            embedding_dim=model.embedding_dim,
            hidden_dim=model.hidden_dim,
        )
        self.objective = make_objective(objective, embedding_dim=model.embedding_dim, hidden_dim=model.hidden_dim)
        # Of the latent's penalty, after its warm-up.
        self.beta = self.objective.default_beta if objective.beta is None else objective.beta
        self.sequence_terms = SequenceTerms(
            {
                "smoothness": objective.smoothness_weight,
                "inverse_dynamics": objective.inverse_dynamics_weight,
                "time_variance": objective.time_variance_weight,
            },
            model.embedding_dim,
            model.hidden_dim,
            self.action_dim,
        )
        self.editor = make_editor(
            model.editor,
            embedding_dim=model.embedding_dim,
            hidden_dim=model.hidden_dim,
            latent_dim=(self.latent.latent_dim if self.latent else 0) + scene_dim + self.action_dim,
            predictor=self.objective.needs_predictor,
        )
        self.distance = (
            TemporalDistance(model.embedding_dim + model.scene_dim, model.hidden_dim, model.distance_dim)
            if model.distance_dim
            else None
        )
        self.distance_error_weight = objective.distance_error_weight
        self.on_sphere = model.embedding_norm == "sphere"
        self.num_steps = objective.rollout_steps
        weights = objective.step_weights or (1.0,) * self.num_steps
        self.step_weights = [weight / sum(weights) for weight in weights]
        # The last segment of a transition, which the posterior sees beside the first one: x++, or x+ itself.
        sees_later = isinstance(model.latent, GaussianConfig | SparseConfig) and model.latent.posterior_sees == "later"
        sees_target = data.num_segments == 2 or not sees_later
        self.seen_at = 1 if sees_target else 2

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, C, H, W] in [0, 1] -> embedding [B, D], normalised as model.embedding_norm says."""
        return self.embedder(video)

    def observe(self, video: Tensor) -> Tensor:
        """video [B, T, C, H, W] in [0, 1] -> the state [B, D + Z] that a future is predicted from."""
        return self.state_of(self.embedder.features(video))

    def state_of(self, features: Tensor) -> Tensor:
        """The encoder's features [B, F] -> the state [B, D + Z]: the embedding and, after it, the scene code."""
        return joined(self.embedder.project(features), self.scene(features) if self.scene else None)

    def embedding_of(self, state: Tensor) -> Tensor:
        """States [..., D + Z] -> embeddings [..., D]."""
        return state[..., : self.embedding_dim]

    def lasting(self, state: Tensor) -> Tensor:
        """States [..., D + Z] -> what of them outlasts a step, [..., D + S]: the embedding, and a code's kept part."""
        if self.scene is None:
            return state
        embedding, code = state.tensor_split([self.embedding_dim], dim=-1)
        return torch.cat([embedding, self.scene.lasting(code)], dim=-1)

    def infer(
        self,
        state: Tensor,
        segments: Tensor,
        known_r: Tensor | None,
        generator: torch.Generator | None = None,
        *,
        action: Tensor | None = None,
    ) -> Inference:
        """What training sees of clips [B, S, T, C, H, W] from a known state [B, D + Z]: r [B, R] of one step.

        R is 0 without a latent; action [B, A].
        """
        return self.infer_from(state, self.seen(segments), known_r, generator, action=action)

    def seen(self, segments: Tensor) -> Tensor | None:
        """What r is inferred from beside the state: the embedding [B, D] of a later one of segments [B, S, T, C, H, W];
        None where no segment is looked at."""
        return self.encode(segments[:, self.seen_at]) if self.sees_later else None

    @property
    def sees_later(self) -> bool:
        """Whether r is inferred from a later segment."""
        return self.latent is not None and self.latent.sees_later

    def infer_from(
        self,
        state: Tensor,
        seen: Tensor | None,
        known_r: Tensor | None,
        generator: torch.Generator | None = None,
        *,
        action: Tensor | None = None,
    ) -> Inference:
        """`infer` from what is `seen` of the clips."""
        if self.latent is None:
            return Inference(state[:, :0], None, None)
        return self.latent.infer(joined(state, action), seen, known_r, generator)

    def sample(
        self, state: Tensor, generator: torch.Generator | None = None, *, action: Tensor | None = None
    ) -> Tensor:
        """state [B, D + Z], action [B, A] -> one draw r [B, R] from the prior for each row."""
        if self.latent is None:
            return state[:, :0]
        return self.latent.prior(joined(state, action)).draw(generator)

    def prior_mean(self, state: Tensor, action: Tensor | None = None) -> Tensor:
        """state [B, D + Z], action [B, A] -> the mean of the prior, r [B, R]."""
        return self.latent.prior(joined(state, action)).mean if self.latent else state[:, :0]

    def edit(self, state: Tensor, r: Tensor, action: Tensor | None = None) -> Tensor:
        """state [B, D + Z], r [B, R], action [B, A] -> the next segment's state, float32 [B, D + Z]: its embedding,
        normalised as the encoder's are, and the same scene code, a step older."""
        embedding, scene = state.tensor_split([self.embedding_dim], dim=1)
        edited = self.editor(embedding, torch.cat([r, joined(scene, action)], dim=1)).float()
        return joined(normalise(edited) if self.on_sphere else edited, self.scene.aged(scene) if self.scene else None)

    def prior_mean_rollout(self, state: Tensor, horizon: int, actions: Tensor | None = None) -> Tensor:
        """The one future at the mean of the prior, step by step: [B, D + Z], actions [B, horizon, A] -> embeddings
        [B, horizon, D]."""
        steps = []
        for step in range(horizon):
            action = None if actions is None else actions[:, step]
            state = self.edit(state, self.prior_mean(state, action), action)
            steps.append(self.embedding_of(state))
        return torch.stack(steps, dim=1)

    def rollout_embedding(
        self,
        state: Tensor,
        horizon: int,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        actions: Tensor | None = None,
        shuffle: bool = False,
    ) -> Tensor:
        """Futures of a state, each step from a fresh draw of the prior: [B, D + Z] -> embeddings [B, S, horizon, D].

        actions [B, horizon, A] where the model is conditioned on them. `shuffle`: each row gets the r that was drawn
        for another clip, a control.
        """
        state = repeat(state, "b d -> (b s) d", s=num_samples)
        repeated = None if actions is None else repeat(actions, "b h a -> (b s) h a", s=num_samples)
        steps = []
        for step in range(horizon):
            action = None if repeated is None else repeated[:, step]
            r = self.sample(state, generator, action=action)
            state = self.edit(state, r.roll(num_samples, dims=0) if shuffle else r, action)
            steps.append(self.embedding_of(state))
        return rearrange(torch.stack(steps, dim=1), "(b s) h d -> b s h d", s=num_samples)

    def rollout(
        self,
        x: Tensor,
        horizon: int,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        actions: Tensor | None = None,
    ) -> Tensor:
        """Sampled futures of a clip: x [B, T, C, H, W] in [0, 1] -> embeddings [B, S, horizon, D]."""
        return self.rollout_embedding(self.observe(x), horizon, num_samples, generator, actions=actions)

    def targets_of(self, segments: Tensor) -> Tensor:
        """The targets of each step of prediction: [B, S, T, C, H, W] -> [K * B, T, C, H, W], step by step."""
        return step_by_step(segments[:, 1 : self.num_steps + 1])

    def forward(
        self,
        segments: Tensor,
        teacher_targets: Tensor | None,
        known_r: Tensor | None,
        beta: float,
        generator: torch.Generator | None = None,
        *,
        actions: Tensor | None = None,
        gradient: "PredictionGradient | None" = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The training losses, all scalars, of which "loss" is the one to minimise; and the targets [K * N, D].

        Both are those of the global batch of N clips, of which these B are this process's share
        (worldmodel/training/distributed.py). With a known `gradient` of the loss by what is predicted, "loss" is a
        stand-in that
        has this gradient, and nothing else is computed.

        segments [B, S, T, C, H, W]; K steps are predicted, each from the prediction before it and the r that the
        posterior infers there; the losses are means over steps by their weights. teacher_targets [K * B, D] are the
        teacher's embeddings of `targets_of(segments)`; without them the targets are the encoder's own. known_r [B, R]
        is what an oracle latent takes, actions [B, K, A] what the model is conditioned on. The encoder also learns
        through the posterior: without that gradient, forecasts are far worse (docs/experiments.md).
        """
        embedded = self.embed(segments, teacher_targets)
        predictions, _ = self.predict(embedded, known_r, generator, actions=actions)
        if gradient is not None:
            return {"loss": gradient.surrogate(predictions)}, predictions.targets
        predictions = predictions.of_all_processes()
        return self.batch_losses(predictions, beta, generator), predictions.targets

    @property
    def compares_clips(self) -> bool:
        """Whether the loss of a batch is not the mean of the losses of its parts."""
        of_objective = self.objective.needs_negatives or self.objective.needs_batch_statistics
        return of_objective or self.sequence_terms.needs_batch_statistics

    def loss_parameters(self) -> list[nn.Parameter]:
        """What of the model belongs to the loss, and takes no part in a prediction."""
        return [*self.objective.parameters(), *self.sequence_terms.parameters()]

    def embed(self, segments: Tensor, teacher_targets: Tensor | None) -> "Embedded":
        """What `losses` reads of segments [B, S, T, C, H, W], with teacher_targets [K * B, D] as in `forward`."""
        clips = [segments[:, 0]]
        if teacher_targets is None:
            clips.append(self.targets_of(segments))
        if self.sees_later:
            clips.append(step_by_step(segments[:, self.seen_at :][:, : self.num_steps]))
        # One call for all: batch statistics over all segments, and one pass through the encoder.
        features = self.embedder.features(torch.cat(clips))
        embeddings = list(self.embedder.project(features).split([len(clip) for clip in clips]))
        context = embeddings.pop(0)
        targets = embeddings.pop(0) if teacher_targets is None else teacher_targets
        real = torch.stack([context, *targets.chunk(self.num_steps)], dim=1)
        seen = torch.stack(embeddings[0].chunk(self.num_steps), dim=1) if embeddings else None
        return Embedded(real, seen, features[: len(context)] if self.scene else None, None)

    def losses(
        self,
        embedded: "Embedded",
        known_r: Tensor | None,
        beta: float,
        generator: torch.Generator | None = None,
        *,
        actions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of `forward` from what `embed` returns."""
        predictions, states = self.predict(embedded, known_r, generator, actions=actions)
        losses = self.batch_losses(predictions, beta, generator)
        if embedded.pairs is not None:
            with torch.autocast(states.device.type, enabled=False):
                of_distance = self._distance_terms(embedded, states[:, 0], states[:, 1:])
            losses["loss"] = losses["loss"] + sum(of_distance.values())
            losses |= {name: value.detach() for name, value in of_distance.items()}
        return losses

    def predict(
        self,
        embedded: "Embedded",
        known_r: Tensor | None,
        generator: torch.Generator | None = None,
        *,
        actions: Tensor | None = None,
    ) -> tuple["Predictions", Tensor]:
        """K steps, each from the state predicted before it; and the states [B, K + 1, D + Z], the context's first."""
        real, seen, features, age = embedded[:4]
        state = real[:, 0]
        if self.scene is not None:
            assert features is not None
            state = joined(state, self.scene(features, age))
        states, inferences = [state], []
        for k in range(self.num_steps):
            action = None if actions is None else actions[:, k]
            seen_now = None if seen is None else seen[:, k]
            inference = self.infer_from(state, seen_now, known_r, generator, action=action)
            state = self.edit(state, inference.r, action)
            states.append(state)
            inferences.append(inference)
        stacked = torch.stack(states, dim=1)
        edited = self.embedding_of(stacked[:, 1:])
        penalty, nll = (_stacked([inference[part] for inference in inferences]) for part in (1, 2))
        return Predictions(real, edited, penalty, nll, actions), stacked

    def batch_losses(
        self, predictions: "Predictions", beta: float, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The losses of `forward` from what was predicted for all clips of a batch, each step by its weight."""
        real, edited, penalty, nll, actions = predictions
        with torch.autocast(real.device.type, enabled=False):
            steps = [
                self._step_losses(
                    edited[:, k],
                    real[:, k + 1],
                    real[:, k],
                    None if penalty is None else penalty[:, k],
                    None if nll is None else nll[:, k],
                    beta,
                    generator,
                )
                for k in range(self.num_steps)
            ]
            of_sequence = self.sequence_terms(real, actions)
        weighted = {name: self._over_steps([terms[name] for terms in steps]) for name in steps[0]}
        loss = weighted.pop("loss") + self.sequence_terms.total(of_sequence)
        logged = {name: value.detach() for name, value in (weighted | of_sequence).items()}
        if self.num_steps > 1:
            logged |= {f"alignment_{k}": terms["alignment"].detach() for k, terms in enumerate(steps, start=1)}
        return {"loss": loss} | logged

    def _over_steps(self, of_steps: Sequence[Tensor]) -> Tensor:
        """The mean of K scalars by the weights of steps."""
        if self.num_steps == 1:
            return of_steps[0]  # each number that is computed on a GPU is a start of its own
        parts = [weight * value for weight, value in zip(self.step_weights, of_steps, strict=True)]
        return torch.stack(parts).sum()

    def _distance_terms(self, embedded: "Embedded", first: Tensor, predicted: Tensor) -> dict[str, Tensor]:
        """What the temporal distance learns by, and what the editor learns by it, weighted: from the state
        of the context [B, D + Z] and predicted states [B, K, D + Z].

        What is kept of a scene code is read from one segment before a step and from another after it, so that its noise
        counts for nothing.
        """
        distance, pairs = self.distance, embedded.pairs
        assert distance is not None and pairs is not None
        with torch.no_grad():
            codes = self.lasting(first)[:, self.embedding_dim :], self._kept_of(embedded.other_features, first)
            lasting = [
                torch.cat([embedded.real, code[:, None].expand(-1, self.num_steps + 1, -1)], dim=-1) for code in codes
            ]
            far = torch.cat([pairs.embeddings, self._kept_of(pairs.features, pairs.embeddings)], dim=-1)
        phi, other_phi = distance(lasting[0]), distance(lasting[1])
        # The distance itself is not to forgive what the editor does.
        fixed = {name: value.detach() for name, value in distance.named_parameters()}
        found = torch.func.functional_call(distance, fixed, self.lasting(predicted))
        error = (found - phi[:, 1:].detach()).square().mean()
        apart = excess_steps(phi[:, :-1], other_phi[:, 1:]) + excess_steps(other_phi[:, :-1], phi[:, 1:])
        return {
            "distance_nearness": nearness(*distance(far)),
            "distance_excess": STEP_WEIGHT * apart / 2,
            "distance_error": self.distance_error_weight * error,
        }

    def _kept_of(self, features: Tensor | None, rows: Tensor) -> Tensor:
        """What a scene code keeps of features [..., F]: [..., S], as many as rows; no numbers without a scene code."""
        if self.scene is None:
            return rows[..., :0]
        assert features is not None
        return self.scene.lasting_of(features)

    def _step_losses(
        self,
        edited: Tensor,
        target: Tensor,
        context: Tensor,
        penalty: Tensor | None,
        nll: Tensor | None,
        beta: float,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """One step's "loss" with its terms, from embeddings [B, D] and what r costs, [B] each. context is the embedding
        of the segment that the step started from."""
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
        return {"loss": loss} | terms


def step_by_step(of_clips: Tensor) -> Tensor:
    """[B, K, ...] -> [K * B, ...]"""
    return rearrange(of_clips, "b k ... -> (k b) ...")


def _stacked(of_steps: Sequence[Tensor | None]) -> Tensor | None:
    """K times [B] -> [B, K]; None where there is none."""
    present = [values for values in of_steps if values is not None]
    return torch.stack(present, dim=1) if present else None


def joined(values: Tensor, action: Tensor | None) -> Tensor:
    """values [B, K], action [B, A] or None -> [B, K + A]."""
    return values if action is None else torch.cat([values, action], dim=-1)
