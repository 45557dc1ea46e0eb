"""Record any Gymnasium environment: RGB videos with actions and states as labels of their frames.

An episode is one video: the picture after the reset and the one after each step. Frame t has the labels

    action           the action that was taken at frame t and led to frame t + 1; zeros at the last frame
    applied_action   the action that the environment executed, if info["applied_action"] is set after each step
    state            info["state"], otherwise the observation if it is a vector of at most 64 numbers

Actions are flattened by gymnasium.spaces.flatten: discrete ones are one-hot. A video has the labels seed (of its reset)
and every number of the reset's info. Its row names its policy if there are several. Random numbers depend on (seed,
split, number of the episode) alone. So an episode is the same whichever process records it.
"""

import contextlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
import yaml

from data_pipelines.decoders import DecodeError, scaled_size
from data_pipelines.errors import UserError, one_line
from data_pipelines.splits import SPLITS, Split
from data_pipelines.text_files import parse_yaml
from data_pipelines.worlds.policies import MakePolicy, Policy, drift, smooth_walk, uniform
from data_pipelines.worlds.written import RECORDED, check_counts, write_episodes

MAX_STATE_NUMBERS = 64
DEFAULT_FPS = 10
OWN_LABELS = frozenset({"file_name", "seed", "policy", "action", "applied_action", "state"})


@dataclass(frozen=True)
class Recording:
    """The settings of a recording.

    env: an id that gymnasium.make knows, MODULE:ID included; imports: modules that register it.
    kwargs: arguments of gymnasium.make, with values that JSON can represent.
    policy: the name of one of the environment's policies(), or "random", "drift", "uniform". Or several
        with their shares of the episodes: "expert=0.7 random=0.3". None: the environment's first, otherwise "random".
    num_steps: steps in an episode, which has one frame more. It ends earlier if the environment terminates, unless
        past_end: then steps continue, which not every environment supports. Time limits are removed.
    size_px: the short side of the videos; None: as rendered.
    """

    env: str
    imports: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    policy: str | None = None
    num_steps: int = 32
    past_end: bool = False
    size_px: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"num_steps": 1, "size_px": 16, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        if self.policy is not None:
            shares_of(self.policy)


def record(
    out: Path, counts: Mapping[Split, int], recording: Recording, *, num_processes: int, overwrite: bool = False
) -> None:
    """Record episodes into out/train, out/selection and out/test, each with its metadata.jsonl.

    world.json stores the settings. An interrupted recording is continued. The result is the same if a seeded reset
    fixes everything that follows in the environment. A complete recording is left unchanged.

    Raises:
        UserError: the environment cannot be made or renders no pictures; it has no such policy; `out` holds other
            files, or another recording and `overwrite` is not given.
    """
    check_counts(counts, num_processes)  # before an environment is made
    facts = json.dumps(asdict(_tried(recording)))
    world = {"world": RECORDED, **json.loads(facts), "counts": {split: counts[split] for split in SPLITS}}
    write_episodes(out, world, counts, RecordedEpisodes(facts), num_processes=num_processes, overwrite=overwrite)


@dataclass(frozen=True)
class RecordedEpisodes:
    """Episodes of an environment (data_pipelines.worlds.written.Episodes). facts: a Recording as JSON."""

    facts: str

    @property
    def fps(self) -> int:
        env, _ = _env_of_process(self.facts)
        return max(1, round(env.metadata.get("render_fps") or DEFAULT_FPS))

    def play(self, split: Split, episode: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the frames of an episode, RGB uint8 [T, H, W, 3], and its row of labels."""
        env, recording = _env_of_process(self.facts)
        return record_episode(env, recording, split, episode)


def _tried(recording: Recording) -> Recording:
    """Return the recording with its policy named, after a first step: mistakes are found before anything is written."""
    try:
        json.dumps(dict(recording.kwargs))
    except TypeError as error:
        raise UserError(f"kwargs={dict(recording.kwargs)!r} cannot be represented in JSON: {error}") from None
    with contextlib.closing(
        make_env(recording.env, recording.kwargs, num_steps=recording.num_steps, imports=recording.imports)
    ) as env:
        offered = offered_policies(env)
        recording = replace(recording, policy=recording.policy or next(iter(offered)))
        for name in shares_of(recording.policy or ""):
            if name not in offered:
                raise UserError(f"policy {name!r} is unknown for {recording.env}: use {', '.join(offered)}")
        record_episode(env, replace(recording, num_steps=1), "train", 0)
    return recording


def make_env(
    env: str, kwargs: Mapping[str, Any], *, num_steps: int, imports: Sequence[str] = ()
) -> gymnasium.Env[Any, Any]:
    """Make an environment that renders pictures and is truncated after num_steps steps.

    Raises:
        UserError: a module or the environment does not exist, or the environment does not take these arguments.
    """
    for module in imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"module {module!r} cannot be imported: {one_line(error)}") from None
    try:
        return gymnasium.make(
            env,
            render_mode="rgb_array",
            max_episode_steps=num_steps,
            disable_env_checker=True,
            **kwargs,
        )
    except UserError:
        raise
    except Exception as error:  # whatever the code of an environment raises
        name = "" if isinstance(error, gymnasium.error.Error | ImportError | TypeError) else f"{type(error).__name__}: "
        raise UserError(f"environment {env!r} cannot be made: {name}{one_line(error)}") from error


def record_episode(
    env: gymnasium.Env, recording: Recording, split: Split, episode: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Run an episode. Return its frames, RGB uint8 [T, H, W, 3], and its row of labels.

    Raises:
        UserError: the environment renders no pictures, or its actions are not a fixed number of numbers.
    """
    entropy = [recording.seed, SPLITS.index(split), episode]
    env_seed, policy_seed = np.random.SeedSequence(entropy).generate_state(2).tolist()
    env_seed >>= 1  # some environments accept 31 bits only
    observation, info = env.reset(seed=env_seed)
    name, policy = _policy(env, recording, np.random.default_rng(policy_seed))
    row: dict[str, Any] = _numbers_of(info) | {"seed": env_seed}
    if name != recording.policy:
        row["policy"] = name
    frames = [_render(env, recording)]
    states = [_state(observation, info)]
    actions: list[list[float]] = []
    applied: list[list[float]] = []
    for _ in range(recording.num_steps):
        action = policy(observation, info)
        observation, _, terminated, truncated, info = env.step(action)
        frames.append(_render(env, recording))
        states.append(_state(observation, info))
        actions.append(_flat_action(env, action))
        if "applied_action" in info:
            applied.append(_flat_action(env, info["applied_action"]))
        if (terminated or truncated) and not recording.past_end:
            break
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        (height, width, _), (other_height, other_width, _) = sorted(sizes)[:2]
        raise UserError(
            f"environment {recording.env!r} renders pictures of {width}x{height} and of {other_width}x{other_height} "
            "in one episode: set a fixed size in its arguments"
        )
    nothing = [0.0] * len(actions[0])
    row["action"] = [*actions, nothing]
    if len(applied) == len(actions):
        row["applied_action"] = [*applied, nothing]
    if all(state is not None for state in states):
        row["state"] = states
    return np.stack(frames), row


def offered_policies(env: gymnasium.Env) -> dict[str, MakePolicy]:
    """Return the policies that an environment can be recorded with, by name, the default first.

    They are those of its method policies(), if it has one, and those of policies.py.
    """
    space = env.action_space
    own: Mapping[str, MakePolicy] = getattr(env.unwrapped, "policies", dict)()
    general = {
        name: partial(make, space) for name, make in (("random", smooth_walk), ("drift", drift), ("uniform", uniform))
    }
    return {**own, **{name: make for name, make in general.items() if name not in own}}


def shares_of(policy: str) -> dict[str, float]:
    """Parse "expert" to {"expert": 1.0}, and "expert=0.7 random=0.3" to the shares of several policies.

    Raises:
        UserError: a share is missing, is not above 0, or they do not add up to 1.
    """
    parts = policy.split()
    if len(parts) == 1 and "=" not in policy:
        return {policy: 1.0}
    try:
        named = {name: float(share) for name, share in (part.split("=") for part in parts)}
    except ValueError:
        named = {}
    if (
        len(named) != len(parts)
        or not all(share > 0 for share in named.values())
        or abs(sum(named.values()) - 1) > 1e-6
    ):
        raise UserError(f"policy={policy!r} must be a name, or NAME=SHARE ... with shares above 0 that add up to 1")
    return named


def _policy(env: gymnasium.Env, recording: Recording, rng: np.random.Generator) -> tuple[str, Policy]:
    """Draw the policy of an episode. Return its name and the policy."""
    assert recording.policy is not None
    shares = shares_of(recording.policy)
    names = list(shares)
    name = names[0] if len(names) == 1 else str(rng.choice(names, p=list(shares.values())))
    return name, offered_policies(env)[name](rng)


def _render(env: gymnasium.Env, recording: Recording) -> np.ndarray:
    try:
        picture = env.render()
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise UserError(f"environment {recording.env!r} renders no pictures: {one_line(error)}") from None
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        what = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise UserError(f"environment {recording.env!r} renders {what} with render_mode='rgb_array', not RGB pictures")
    try:
        size = scaled_size(picture.shape[:2], recording.size_px)
    except DecodeError as error:
        raise UserError(f"size_px={recording.size_px}: {error}") from None
    if size == picture.shape[:2]:
        return picture
    planes = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
    return F.interpolate(planes, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def _state(observation: Any, info: Mapping[str, Any]) -> list[float] | None:
    state = info.get("state", observation)
    if not isinstance(state, np.ndarray) or (state is observation and state.ndim != 1):
        return None
    return _floats(state) if state.size <= MAX_STATE_NUMBERS else None


def _flat_action(env: gymnasium.Env, action: Any) -> list[float]:
    space = env.action_space
    if not space.is_np_flattenable:
        raise UserError(f"actions of {space} are not a fixed number of numbers: such an environment cannot be recorded")
    return _floats(gymnasium.spaces.flatten(space, action))


def _floats(values: Any) -> list[float]:
    """Return the shortest decimals that are the same float32, the type as which labels are read."""
    return [float(str(value)) for value in np.asarray(values, np.float32).ravel()]


def _numbers_of(info: Mapping[str, Any]) -> dict[str, int | float]:
    numbers: dict[str, int | float] = {}
    for name, value in info.items():
        number = value.item() if isinstance(value, np.generic) else value
        if isinstance(number, int | float) and name not in OWN_LABELS:
            numbers[name] = int(number) if isinstance(number, bool) else number
    return numbers


@lru_cache(maxsize=1)
def _env_of_process(facts: str) -> tuple[gymnasium.Env, Recording]:
    fields = json.loads(facts)
    recording = Recording(**fields | {"imports": tuple(fields["imports"])})
    return make_env(
        recording.env, recording.kwargs, num_steps=recording.num_steps, imports=recording.imports
    ), recording


def parse_kwargs(texts: Sequence[str]) -> dict[str, Any]:
    """Parse ["slip=0.1", "layout=random"] to {"slip": 0.1, "layout": "random"}. Values are YAML.

    Raises:
        UserError: a text has another form.
    """
    kwargs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not (name.isidentifier() and equals):
                raise ValueError
            kwargs[name] = parse_yaml(value)
        except (ValueError, yaml.YAMLError):
            hint = ": put overrides before the options, or after --" if "." in text.partition("=")[0] else ""
            raise UserError(
                f"argument {text!r} of the environment must read NAME=VALUE, such as slip=0.1{hint}"
            ) from None
    return kwargs
