import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from worldmodel.build import build_training_model
from worldmodel.config import (
    Config,
    Conv3dConfig,
    ModelConfig,
    NoLatentConfig,
    ResidualEditorConfig,
    TeacherObjective,
    VicregConfig,
    VideosConfig,
    choices,
)
from worldmodel.data import TrainingInputs
from worldmodel.nets.distributions import Gaussian, Mixture, draw_and_choice, gaussian_kl
from worldmodel.nets.latents import PRIOR_NLL, GaussianLatent
from worldmodel.nets.scene import SceneCode
from worldmodel.nets.world_model import WorldModel, concat
from worldmodel.training.losses import TrainingModel
from worldmodel.training.objectives import covariance_penalty

LATENTS = ("none", "gaussian", "sparse", "oracle")


def training(
    latent: str = "gaussian",
    objective: str = "byol",
    num_segments: int = 3,
    step_weights: tuple[float, ...] = (1.0,),
    posterior_sees: str = "later",
    prior_components: int = 1,
    editor: str = "mlp",
    data_changes: dict[str, Any] | None = None,
    **changes: object,
) -> TrainingModel:
    torch.manual_seed(0)
    latent_keys: dict[str, Any] = {} if latent == "none" else {"dim": 3, "prior_components": prior_components}
    if latent in ("gaussian", "sparse"):
        latent_keys["posterior_sees"] = posterior_sees
    parts = {
        "encoder": Conv3dConfig(width=0.125),
        "latent": choices("model.latent")[latent](**latent_keys),
        "editor": choices("model.editor")[editor](),
    }
    return build_training_model(
        Config(
            run_dir="",
            data=VideosConfig(channels=1, num_segments=num_segments, **(data_changes or {})),  # type: ignore[arg-type]
            model=ModelConfig(**parts, **{"embedding_dim": 16, "hidden_dim": 32, **changes}),  # type: ignore[arg-type]
            objective=choices("objective")[objective](
                name=objective, rollout_steps=len(step_weights), step_weights=step_weights
            ),
        )
    )


def model(latent: str = "gaussian", **changes: object) -> WorldModel:
    return training(latent, **changes).model  # type: ignore[arg-type]


def clip(batch: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, 1, 64, 64, generator=torch.Generator().manual_seed(seed))


def segments(batch: int = 4, count: int = 3) -> torch.Tensor:
    return torch.stack([clip(batch, seed) for seed in range(count)], dim=1)


def embeddings(batch: int = 4, dims: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, dims, generator=torch.Generator().manual_seed(seed))


def known_r(batch: int = 4) -> torch.Tensor:
    return embeddings(batch, 3, seed=7)


def no_actions(batch: int = 4, steps: int = 1) -> torch.Tensor:
    return torch.empty(batch, steps, 0)


def step(
    world: TrainingModel, clips: torch.Tensor, targets: torch.Tensor | None, beta: float = 0.1, seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs = TrainingInputs(clips, known_r(), no_actions(len(clips), world.num_steps))
    return world(inputs, targets, beta, torch.Generator().manual_seed(seed))


def losses(world: TrainingModel, beta: float = 0.1, seed: int = 0) -> dict[str, torch.Tensor]:
    return step(world, segments(), embeddings() if world.objective.needs_teacher else None, beta, seed)[0]


def test_rollout_shape_and_determinism() -> None:
    world = model().eval()
    with torch.no_grad():
        futures = world.rollout(clip(), 5, 7, torch.Generator().manual_seed(2))
        again = world.rollout(clip(), 5, 7, torch.Generator().manual_seed(2))
        other = world.rollout(clip(), 5, 7, torch.Generator().manual_seed(3))
    assert futures.shape == (4, 7, 5, 16)
    assert torch.equal(futures, again)
    assert not torch.allclose(futures, other)
    assert futures.std(dim=1).min() > 0


def test_rollout_feeds_predictions_back() -> None:
    """Step h of a long rollout is a one-step rollout of step h - 1, with the same draw."""
    world = model().eval()
    context = embeddings()
    with torch.no_grad():
        two_steps = world.rollout_embedding(context, 2, 1, torch.Generator().manual_seed(5))[:, 0]
        generator = torch.Generator().manual_seed(5)
        first = world.edit(context, world.sample(context, generator))
        second = world.edit(first, world.sample(first, generator))
    torch.testing.assert_close(two_steps, torch.stack([first, second], dim=1))


def test_edited_embeddings_are_as_long_as_encoded_ones() -> None:
    world = model().eval()
    with torch.no_grad():
        encoded = world.encode(clip())
        futures = world.rollout(clip(), 3, 2)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((4,), 4.0))
    torch.testing.assert_close(futures.norm(dim=-1), torch.full((4, 2, 3), 4.0))


def test_off_the_sphere_embeddings_keep_their_own_length() -> None:
    world = model(objective="infonce", embedding_norm="standard")
    encoded = world.encode(clip())
    torch.testing.assert_close(encoded.mean(dim=0), torch.zeros(16), atol=1e-5, rtol=0)
    assert encoded.norm(dim=-1).std() > 0.1
    assert world.edit(encoded, known_r()).norm(dim=-1).std() > 0.01


def test_samples_come_from_the_prior() -> None:
    world = model().eval()
    context = embeddings(1).expand(20_000, -1)
    with torch.no_grad():
        prior = world.latent.prior(context[:1])
        assert isinstance(prior, Mixture)
        components = prior.components
        draws = world.sample(context, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(dim=0), components.mean[0, 0], atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(dim=0), components.scale[0, 0], atol=0.05, rtol=0)


def test_loss_is_prediction_plus_beta_kl() -> None:
    trained = training().eval()  # running statistics: the parts can be computed one by one
    world = trained.model
    x, _, later = segments().unbind(1)
    target = embeddings()
    seen = losses(trained, beta=0.25)
    assert isinstance(world.latent, GaussianLatent)
    context = world.encode(x)
    q, p = world.latent.posterior(context, world.encode(later)), world.latent.prior(context)
    assert isinstance(p, Mixture)
    kl = gaussian_kl(q, Gaussian(p.components.mean[:, 0], p.components.scale[:, 0])).mean()
    r = q.mean + q.scale * torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(0))
    prediction = -F.cosine_similarity(world.edit(context, r), target, dim=-1).mean()
    torch.testing.assert_close(seen["loss"], prediction + 0.25 * kl)
    torch.testing.assert_close(seen["kl_nats"], kl.detach())
    assert seen["kl_nats"] > 0


def test_the_bound_on_information_is_that_of_the_edited_embedding_minus_the_kl() -> None:
    """Chain rule: a latent may explain the target only at the price of what it says beyond the past."""
    trained = training(objective="infonce").eval()
    world, seen = trained.model, losses(trained)
    x, target, _ = segments().unbind(1)
    context = world.encode(x)
    r = world.infer(context, segments(), known_r(), torch.Generator().manual_seed(0)).r
    edited = world.edit(context, r)
    cosines = F.cosine_similarity(edited[:, None], world.encode(target)[None], dim=-1) / 0.1
    expected = (cosines.diagonal() - cosines.logsumexp(dim=1)).mean() + torch.tensor(4.0).log() - seen["kl_nats"]
    torch.testing.assert_close(seen["information_nats"], expected.detach())
    assert seen["information_nats"] + seen["kl_nats"] <= torch.tensor(4.0).log()


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize(
    ("objective", "editor"),
    [*((name, "mlp") for name in choices("objective")), ("byol", "low_rank"), ("infonce", "low_rank")],
)
def test_every_parameter_learns(objective: str, latent: str, editor: str) -> None:
    world = training(latent, objective, editor=editor)
    for parameter in world.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # zero initialisations would hide what lies behind them
    losses(world)["loss"].backward()
    still = [name for name, p in world.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still


def test_the_encoder_learns_through_the_posterior() -> None:
    """The loss has a gradient in x++. With running statistics no other way than the posterior leads there."""
    clips = segments().requires_grad_()
    step(training().eval(), clips, embeddings())[0]["loss"].backward()
    assert clips.grad is not None and clips.grad[:, 2].abs().max() > 0


@pytest.mark.parametrize("latent", ["sparse", "oracle"])
def test_a_fitted_prior_sends_no_gradient_to_the_rest(latent: str) -> None:
    world = model(latent).eval()
    context = embeddings().requires_grad_()
    costs = world.latent.infer(context, embeddings(seed=2), known_r(), torch.Generator().manual_seed(0)).costs
    costs[PRIOR_NLL].sum().backward()
    assert context.grad is None
    with_gradient = {name.split(".")[0] for name, p in world.named_parameters() if p.grad is not None}
    assert with_gradient == {"latent"}
    assert all(p.grad is None for name, p in world.named_parameters() if name.startswith("latent.net"))


def test_a_shared_encoder_learns_from_the_target_too() -> None:
    for objective, kind in choices("objective").items():
        world = training("none", objective).eval()
        clips = segments().requires_grad_()
        step(world, clips, embeddings() if issubclass(kind, TeacherObjective) else None)[0]["loss"].backward()
        assert clips.grad is not None
        assert (clips.grad[:, 1].abs().max() == 0) == issubclass(kind, TeacherObjective), objective


@pytest.mark.parametrize(("sees", "num_segments"), [("later", 3), ("target", 3), ("later", 2)])
def test_the_third_view_is_a_choice(sees: str, num_segments: int) -> None:
    """Only the segment that the posterior sees moves r; of two segments it is the target."""
    for objective in ("byol", "infonce"):
        world = training(objective=objective, posterior_sees=sees, num_segments=num_segments).eval()
        x, target, later = segments().unbind(1)
        moved = {
            "target": torch.stack([x, clip(seed=9), later], dim=1),
            "later": torch.stack([x, target, clip(seed=9)], dim=1),
        }
        kl = {"before": losses(world)["kl_nats"]}
        for name, changed in moved.items():
            teacher_target = embeddings() if world.objective.needs_teacher else None
            kl[name] = step(world, changed, teacher_target)[0]["kl_nats"]
        expected = "target" if num_segments == 2 else sees
        for name in moved:
            assert torch.equal(kl["before"], kl[name]) == (name != expected), (objective, name)


def test_without_a_latent_there_is_one_future() -> None:
    trained = training("none").eval()
    with torch.no_grad():
        futures = trained.model.rollout(clip(), 2, 5)
        inference = trained.model.infer(embeddings(), segments(), known_r())
    torch.testing.assert_close(futures, futures[:, :1].expand(-1, 5, -1, -1))
    assert inference.r.shape == (4, 0) and not inference.costs and inference.penalty is None
    assert "kl_nats" not in losses(trained)


@pytest.mark.parametrize("latent", ["gaussian", "sparse"])
def test_r_moves_with_both_segments(latent: str) -> None:
    world = model(latent).eval()
    drawn = {}
    for seeds in itertools.product((1, 3), (2, 4)):
        context, later = (embeddings(64, seed=seed) for seed in seeds)
        with torch.no_grad():
            drawn[seeds] = world.latent.infer(context, later, known_r(64), torch.Generator().manual_seed(0)).r
    assert not torch.allclose(drawn[1, 2], drawn[3, 2]) and not torch.allclose(drawn[1, 2], drawn[1, 4])


def test_oracle_r_is_what_the_labels_say() -> None:
    world = model("oracle").eval()
    assert torch.equal(world.infer(embeddings(), segments(), known_r()).r, known_r())


def learn_scenes(world: WorldModel) -> WorldModel:
    assert isinstance(world.scene, SceneCode)
    world.scene.learn(torch.randn(32, 3, len(world.scene.mean), generator=torch.Generator().manual_seed(0)))
    return world


@pytest.mark.parametrize(
    ("sees", "num_segments", "scene_dim"), [("later", 3, 0), ("target", 3, 0), ("later", 2, 0), ("later", 3, 5)]
)
def test_the_loss_of_a_rollout_is_that_of_its_steps_each_from_the_prediction_before_it(
    sees: str, num_segments: int, scene_dim: int
) -> None:
    """Computed here step by step: the posterior's segment moves along, and the steps have their weights."""
    weights = (1.0, 0.5, 2.0)
    trained = training(num_segments=num_segments, posterior_sees=sees, step_weights=weights, scene_dim=scene_dim)
    world = trained.eval().model
    if scene_dim:
        learn_scenes(world)
    clips = segments(count=num_segments + 2)
    targets = [embeddings(seed=seed) for seed in (5, 6, 7)]
    seen, returned = step(trained, clips, torch.cat(targets), 0.25)
    generator = torch.Generator().manual_seed(0)
    assert isinstance(world.latent, GaussianLatent)
    state, total = world.observe(clips[:, 0]), torch.zeros(())
    first_seen = 1 if sees == "target" or num_segments == 2 else 2
    for k, (weight, target) in enumerate(zip(weights, targets, strict=True)):
        inference = world.latent.infer(state, world.encode(clips[:, first_seen + k]), known_r(), generator)
        kl = inference.costs["kl_nats"]
        state = world.edit(state, inference.r)
        alignment = F.cosine_similarity(world.embedding_of(state), target, dim=-1).mean()
        torch.testing.assert_close(seen[f"alignment_{k + 1}"], alignment.detach())
        total = total + weight / 3.5 * (0.25 * kl.mean() - alignment)
    torch.testing.assert_close(seen["loss"], total)
    assert torch.equal(returned, torch.cat(targets))


def test_targets_of_a_rollout_come_step_by_step() -> None:
    clips = segments(count=5)
    expected = torch.cat([clips[:, 1], clips[:, 2], clips[:, 3]])
    assert torch.equal(training(step_weights=(1.0, 1.0, 1.0)).targets_of(clips), expected)


def test_later_steps_teach_the_encoder_of_the_context() -> None:
    """Only the last step counts: the gradient comes back through the whole rollout."""
    world = training(step_weights=(0.0, 0.0, 1.0)).eval()
    clips = segments(count=5).requires_grad_()
    step(world, clips, embeddings(12), 0.0)[0]["loss"].backward()
    assert clips.grad is not None and clips.grad[:, 0].abs().max() > 0


def test_shuffling_gives_each_clip_the_r_of_one_half_the_batch_away() -> None:
    world = model().eval()
    context = embeddings()
    with torch.no_grad():
        shuffled = world.rollout_embedding(context, 1, 3, torch.Generator().manual_seed(0), shuffle=True)
        r = world.sample(context.repeat_interleave(3, dim=0), torch.Generator().manual_seed(0))
        expected = world.edit(context.repeat_interleave(3, dim=0), r.roll(3 * (len(context) // 2), dims=0))
    torch.testing.assert_close(shuffled[:, :, 0].flatten(0, 1), expected)


@pytest.mark.parametrize("latent", ["gaussian", "sparse"])
def test_futures_come_with_the_probability_of_the_choices_so_far(latent: str) -> None:
    world = model(latent, prior_components=3).eval()
    context = embeddings()
    futures, log_probabilities = world.futures_with_choices(
        context, no_actions(4, 2), 5, torch.Generator().manual_seed(0)
    )
    assert torch.equal(futures, world.rollout_embedding(context, 2, 5, torch.Generator().manual_seed(0)))
    state, total = context.repeat_interleave(5, dim=0), torch.zeros(20)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        r, log_probability = draw_and_choice(world.latent.prior(state), generator)
        state, total = world.edit(state, r), total + log_probability
        assert torch.equal(log_probabilities[:, :, step].flatten(), total)
    assert log_probabilities.requires_grad


@pytest.mark.parametrize("latent", ["none", "gaussian"])
def test_without_choices_their_log_probability_is_zero(latent: str) -> None:
    world = model(latent).eval()
    log_probabilities = world.futures_with_choices(embeddings(), no_actions(4, 2), 5)[1]
    assert log_probabilities.shape == (4, 5, 2) and not log_probabilities.any()


def test_the_prior_mean_is_rolled_out_step_by_step() -> None:
    world = model().eval()
    context = embeddings()
    with torch.no_grad():
        rolled = world.prior_mean_rollout(context, 2)
        first = world.edit(context, world.latent.prior(context).mean)
        second = world.edit(first, world.latent.prior(first).mean)
    torch.testing.assert_close(rolled, torch.stack([first, second], dim=1))


def test_actions_condition_prior_posterior_and_editor() -> None:
    """Three numbers an action and frame, three frames: what each network sees is the embedding, then the action."""
    world = model(action_dim=3, editor="residual").eval()
    assert world.action_dim == 9 and isinstance(world.latent, GaussianLatent)
    context, action, later = embeddings(), embeddings(dims=9, seed=3), embeddings(seed=4)
    with_action = torch.cat([context, action], dim=1)
    generator = torch.Generator().manual_seed(0)
    r = world.sample(context, torch.Generator().manual_seed(0), action=action)
    assert torch.equal(r, world.latent.prior(with_action).draw(generator))
    expected = world.editor(context, torch.cat([r, action], dim=1))
    torch.testing.assert_close(world.edit(context, r, action), F.normalize(expected, dim=-1) * 4)
    q = world.latent.posterior(with_action, later)
    assert not torch.allclose(q.mean, world.latent.posterior(torch.cat([context, -action], dim=1), later).mean)


def test_a_rollout_takes_the_actions_in_their_order() -> None:
    world = model("none", action_dim=1, editor="residual").eval()
    context, actions = embeddings(), embeddings(dims=6, seed=3).unflatten(1, (2, 3))
    rolled = world.rollout_embedding(context, 2, 3, actions=actions)
    first = world.edit(context, context[:, :0], actions[:, 0])
    second = world.edit(first, context[:, :0], actions[:, 1])
    for sample in range(3):
        torch.testing.assert_close(rolled[:, sample], torch.stack([first, second], dim=1))
    torch.testing.assert_close(world.prior_mean_rollout(context, 2, actions), rolled[:, 0])


def test_the_loss_of_a_model_with_actions_is_that_of_its_steps_and_of_its_sequence_terms() -> None:
    torch.manual_seed(0)
    trained = build_training_model(
        Config(
            run_dir="",
            data=VideosConfig(channels=1, num_segments=2),
            model=ModelConfig(
                encoder=Conv3dConfig(width=0.125), latent=NoLatentConfig(), editor=ResidualEditorConfig(),
                embedding_dim=16, hidden_dim=32, action_dim=1, embedding_norm="standard",
            ),
            objective=VicregConfig(
                vicreg_weights=(1.0, 0.0, 0.5), rollout_steps=2, smoothness_weight=2.0,
                inverse_dynamics_weight=3.0,
            ),
        )
    ).eval()  # fmt: skip
    clips, actions = segments(count=3), embeddings(dims=6, seed=3).unflatten(1, (2, 3))
    world = trained.model
    values, _ = trained(TrainingInputs(clips, known_r(), actions), None, 0.0)
    real = torch.stack([world.encode(clips[:, k]) for k in range(3)], dim=1)
    state, total = real[:, 0], torch.zeros(())
    for k in range(2):
        state = world.edit(state, state[:, :0], actions[:, k])
        covariance = covariance_penalty(real[:, k]) + covariance_penalty(real[:, k + 1])
        total = total + (F.mse_loss(state, real[:, k + 1]) + 0.5 * covariance) / 2
    smoothness = (real[:, 1:] - real[:, :-1]).square().mean()
    read = trained.sequence_terms.action_net(torch.cat([real[:, :-1], real[:, 1:]], dim=-1).flatten(0, 1))
    total = total + 2 * smoothness + 3 * (read - actions.flatten(0, 1)).square().mean()
    torch.testing.assert_close(values["loss"], total, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values["smoothness"], smoothness.detach())


def test_a_scene_code_is_nothing_before_it_is_learned() -> None:
    trained = training("gaussian", scene_dim=4)
    losses(trained)["loss"].backward()
    world = trained.model
    assert all(p.grad is None for p in world.scene.parameters())
    with torch.no_grad():
        state = world.observe(clip())
        assert not state[:, 16:].any() and not world.edit(state, known_r())[:, 16:].any()


def test_a_scene_code_persists_over_a_rollout_and_grows_older() -> None:
    world = learn_scenes(model("gaussian", scene_dim=4)).eval()
    with torch.no_grad():
        state = world.observe(clip())
        assert state.shape == (4, 16 + 9) and torch.equal(world.embedding_of(state), world.encode(clip()))
        steps = [state]
        for _ in range(3):
            steps.append(world.edit(steps[-1], world.prior_mean(steps[-1])))
        rolled = world.prior_mean_rollout(state, 3)
    assert all(torch.equal(step[:, 20:24], state[:, 20:24]) for step in steps)
    assert state[:, 16:20].abs().min() > 0 and not torch.stack(steps[1:])[:, :, 16:20].any()
    torch.testing.assert_close(torch.stack(steps)[:, 0, -1], torch.tensor([0, 1 / 2, 2 / 3, 3 / 4]))
    torch.testing.assert_close(rolled, torch.stack([world.embedding_of(step) for step in steps[1:]], dim=1))


def test_a_scene_code_decides_the_next_step_and_learns_from_it() -> None:
    trained = training("gaussian", scene_dim=4)
    world = learn_scenes(trained.model)
    losses(trained)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in world.scene.parameters() if p.ndim == 2)
    world.eval()
    with torch.no_grad():
        state = world.observe(clip())
        other = torch.cat([state[:, :16], state[:, 16:].flip(0)], dim=1)
        assert not torch.allclose(world.edit(state, known_r()), world.edit(other, known_r()))
        assert not torch.allclose(world.prior_mean(state), world.prior_mean(other))


def test_a_scene_code_read_some_steps_ago_holds_its_age() -> None:
    world = learn_scenes(model("gaussian", scene_dim=4)).eval()
    features = embeddings(dims=world.embedder.num_features)
    with torch.no_grad():
        fresh, old = world.scene(features, torch.zeros(4)), world.scene(features, torch.tensor([0, 1, 2, 3]))
        assert torch.equal(fresh[:, 4:-1], old[:, 4:-1]) and torch.equal(fresh[0], old[0])
        assert fresh[:, :4].abs().min() > 0 and not old[1:, :4].any()
        torch.testing.assert_close(old[3, -1], fresh[3, -1] * 0 + 3 / 4)
        torch.testing.assert_close(world.scene.advance(old)[:3, -1], old[1:, -1])


def test_parts_of_width_zero_are_skipped() -> None:
    values, empty = torch.ones(2, 3), torch.empty(2, 0)
    assert concat(values, empty, None) is values
    assert concat(empty, values) is values and concat(empty, empty) is empty
    assert torch.equal(concat(values, empty, 2 * values), torch.cat([values, 2 * values], dim=1))
