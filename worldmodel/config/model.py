"""The networks: the section `model`, in which encoder, latent and editor are choices by `name`."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from worldmodel.config.kinds import (
    KEYS,
    Choice,
    EmbeddingNorm,
    Flag,
    Options,
    OutsideName,
    PathText,
    Pixels,
    Repeat,
    Size,
    SizeFrom0,
    Text,
)

Width = Annotated[float, Field(strict=True, gt=0, le=64, allow_inf_nan=False)]
Pooling = Literal["mean", "moments"]
Kernels = Literal["space_time", "space"]
TokenPooling = Literal["mean", "attention"]
Norm = Literal["batch", "layer", "none"]


@dataclass(frozen=True, config=KEYS)
class External:
    """A class in the user's own code, outside of the project."""

    name: OutsideName
    """`package.module:Class`."""
    options: Options = dataclasses.field(default_factory=dict)
    """Arguments of the class, alongside those that the project gives it."""

    @property
    def built_by(self) -> str:
        """The class."""
        return self.name


# ------------------------------------------------------------------------------------------------------- encoders


@dataclass(frozen=True, config=KEYS)
class Conv3dConfig:
    """The published 3D convolutional network (AdaSSL, arXiv 2602.02381, appendix D.5)."""

    built_by: ClassVar[str] = "worldmodel.nets.encoders:Conv3dEncoder"
    content: ClassVar[str] = "frames"

    name: Literal["conv3d"] = "conv3d"
    """Name of the encoder."""
    width: Width = 1.0
    """Factor for the numbers of channels."""
    pooling: Pooling = "mean"
    """Statistics of the last feature maps. mean: means, as published. moments: also the first and second moments of the
    pixel coordinates, weighted by the map, which carry positions."""
    kernels: Kernels = "space_time"
    """Convolutions. space_time: three over space and two over time, as published. space: five over space, of each frame
    by itself. A segment of one frame, over which time has no extent, can show positions more precisely; encoding takes
    about a quarter longer."""


@dataclass(frozen=True, config=KEYS)
class ResNetConfig:
    """A residual 3D convolutional network, for frames of 128 px and more."""

    built_by: ClassVar[str] = "worldmodel.nets.encoders:ResNetEncoder"
    content: ClassVar[str] = "frames"
    least_px: ClassVar[int] = 128
    """Side of the smallest frames that it is meant for, pixels."""

    name: Literal["resnet"] = "resnet"
    """Name of the encoder."""
    width: Width = 1.0
    """Factor for the numbers of channels."""
    pooling: Pooling = "mean"
    """Statistics of the last feature maps, as for conv3d."""


@dataclass(frozen=True, config=KEYS)
class DeviationConfig:
    """Moments of the deviation from the mean frame, for videos of a fixed camera (worldmodel/nets/deviation.py)."""

    built_by: ClassVar[str] = "worldmodel.nets.deviation:DeviationEncoder"
    content: ClassVar[str] = "frames"

    name: Literal["deviation"] = "deviation"
    """Name of the encoder."""


@dataclass(frozen=True, config=KEYS)
class ObjectsConfig:
    """Shares and centres of what moves before a fixed camera, assigned to objects by a small network
    (worldmodel/nets/objects.py)."""

    built_by: ClassVar[str] = "worldmodel.nets.objects:ObjectsEncoder"
    content: ClassVar[str] = "frames"

    name: Literal["objects"] = "objects"
    """Name of the encoder."""
    num_objects: Size = 16
    """Objects, a few more than move at a time."""
    width: Width = 1.0
    """Factor for the numbers of channels."""


@dataclass(frozen=True, config=KEYS)
class MlpConfig:
    """A multilayer perceptron for the factors of `data.source=causal`, and only for them."""

    built_by: ClassVar[str] = "worldmodel.nets.encoders:MlpEncoder"
    content: ClassVar[str] = "factors"

    name: Literal["mlp"] = "mlp"
    """Name of the encoder."""
    width: Width = 1.0
    """Factor for the numbers of hidden units."""


@dataclass(frozen=True, config=KEYS)
class VitConfig:
    """A vision transformer over patches in space and time (worldmodel/nets/vit.py)."""

    built_by: ClassVar[str] = "worldmodel.nets.vit:vit_encoder"
    content: ClassVar[str] = "frames"

    name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large"]
    """Name of the encoder, which states its size."""
    patch_px: Pixels = 16
    """Side of a patch, pixels. Divides `data.size_px`."""
    checkpoint_activations: Flag = False
    """Recompute activations in the backward pass instead of storing them: far less memory for one extra forward pass of
    the encoder."""


@dataclass(frozen=True, config=KEYS)
class PretrainedConfig:
    """A pretrained image model on each frame, or a video model on each segment (worldmodel/nets/pretrained.py). Needs
    the package transformers."""

    built_by: ClassVar[str] = "worldmodel.nets.pretrained:PretrainedEncoder"
    content: ClassVar[str] = "frames"

    name: Literal["pretrained"] = "pretrained"
    """Name of the encoder."""
    path: PathText | None = None
    """Folder with config.json and model.safetensors, or name of a model on the Hugging Face hub; required. The weights
    are read from it whenever the run is loaded."""
    freeze: Flag = False
    """Freeze the model: only the pooling by attention and the networks after it are trained."""
    pooling: TokenPooling = "mean"
    """Features from the last tokens. mean: over the patches of each frame, or of each tubelet of a video model; what
    moved where is lost in part. attention: learned queries read all patches of the segment with their places and times,
    for a frozen model above all."""
    checkpoint_activations: Flag = False
    """Recompute activations in the backward pass instead of storing them: far less memory for one extra forward pass of
    the encoder."""


EncoderConfig = (
    Conv3dConfig | ResNetConfig | DeviationConfig | ObjectsConfig | MlpConfig | VitConfig | PretrainedConfig | External
)


# -------------------------------------------------------------------------------------------------------- latents


@dataclass(frozen=True, config=KEYS)
class GaussianConfig:
    """A Gaussian posterior with a learned prior: AdaSSL-V (arXiv 2602.02381)."""

    built_by: ClassVar[str] = "worldmodel.nets.latents:GaussianLatent"

    name: Literal["gaussian"] = "gaussian"
    """Name of the latent variable."""
    dim: Size = 2
    """Dimensions of r."""
    posterior_sees: Literal["later", "target"] = "later"
    """Segment from which r is inferred, besides x. later: x++. target: x+ itself."""
    prior: Literal["mixture", "flow", "linear"] = "mixture"
    """Prior of r. mixture: of Gaussians. flow: a conditional normalising flow, which needs the package zuko. linear: a
    Gaussian whose mean is linear in the context plus a small MLP; with `model.editor=linear`, refinement starts it at
    the linear-Gaussian forecast."""
    prior_components: Repeat = 1
    """Components of a mixture; the paper has one. Other priors have no use for it."""


@dataclass(frozen=True, config=KEYS)
class SparseConfig:
    """A sparse r with an L0 penalty: AdaSSL-S (arXiv 2602.02381). Its prior is fitted alongside."""

    built_by: ClassVar[str] = "worldmodel.nets.latents:SparseLatent"

    name: Literal["sparse"] = "sparse"
    """Name of the latent variable."""
    dim: Size = 2
    """Dimensions of r."""
    posterior_sees: Literal["later", "target"] = "later"
    """Segment from which r is inferred, besides x. later: x++. target: x+ itself."""
    prior_components: Repeat = 1
    """Components of the spike-and-slab prior."""


@dataclass(frozen=True, config=KEYS)
class OracleConfig:
    """The true r, read from the labels: an upper reference. Its prior is fitted alongside."""

    built_by: ClassVar[str] = "worldmodel.nets.latents:OracleLatent"

    name: Literal["oracle"] = "oracle"
    """Name of the latent variable."""
    dim: Size = 2
    """Dimensions of r, as many as the label has numbers."""
    label: Text | None = None
    """Label that holds the true r. null: `change` for `data.source=causal`, otherwise `velocity_change`."""
    prior_components: Repeat = 1
    """Components of the spike-and-slab prior."""


@dataclass(frozen=True, config=KEYS)
class NoLatentConfig:
    """No latent variable: one future for each past."""

    built_by: ClassVar[str] = "worldmodel.nets.latents:NoLatent"

    name: Literal["none"] = "none"
    """Name of the latent variable."""


LatentConfig = GaussianConfig | SparseConfig | OracleConfig | NoLatentConfig | External


# -------------------------------------------------------------------------------------------------------- editors


@dataclass(frozen=True, config=KEYS)
class MlpEditorConfig:
    """t(z, r) is an MLP of both."""

    built_by: ClassVar[str] = "worldmodel.nets.editors:MlpEditor"
    takes_conditions: ClassVar[bool] = True
    """Accepts actions and a scene code alongside r."""

    name: Literal["mlp"] = "mlp"
    """Name of the editor."""
    norm: Norm = "batch"
    """Layers of the MLP, and of the scene code. batch: batch norm and ReLU, as published. layer: layer norm and GELU.
    none: ReLU alone, which learns sharp changes, such as contacts, from far fewer updates."""


@dataclass(frozen=True, config=KEYS)
class ResidualEditorConfig:
    """t(z, r) is z plus an MLP of both."""

    built_by: ClassVar[str] = "worldmodel.nets.editors:ResidualEditor"
    takes_conditions: ClassVar[bool] = True

    name: Literal["residual"] = "residual"
    """Name of the editor."""
    norm: Norm = "batch"
    """Layers of the MLP, and of the scene code: batch norm and ReLU, layer norm and GELU, or ReLU alone."""


@dataclass(frozen=True, config=KEYS)
class BlocksEditorConfig:
    """t(z, r) is z plus a linear map and a residual network of both, which learns sharp changes in many dimensions."""

    built_by: ClassVar[str] = "worldmodel.nets.editors:BlocksEditor"
    takes_conditions: ClassVar[bool] = True

    name: Literal["blocks"] = "blocks"
    """Name of the editor."""
    num_blocks: Repeat = 2
    """Residual blocks of layer norm and two layers."""


@dataclass(frozen=True, config=KEYS)
class SumEditorConfig:
    """t(z, r) = z + r."""

    built_by: ClassVar[str] = "worldmodel.nets.editors:sum_editor"
    takes_conditions: ClassVar[bool] = False

    name: Literal["sum"] = "sum"
    """Name of the editor."""
    norm: Norm = "batch"
    """Layers of the predictor that some objectives add: batch norm and ReLU, layer norm and GELU, or ReLU alone."""


@dataclass(frozen=True, config=KEYS)
class LowRankEditorConfig:
    """t(z, r) is z plus one low-rank module for each coordinate of r."""

    built_by: ClassVar[str] = "worldmodel.nets.editors:low_rank_editor"
    takes_conditions: ClassVar[bool] = False

    name: Literal["low_rank"] = "low_rank"
    """Name of the editor."""
    norm: Norm = "batch"
    """Layers of the predictor that some objectives add: batch norm and ReLU, layer norm and GELU, or ReLU alone."""


@dataclass(frozen=True, config=KEYS)
class LinearEditorConfig:
    """t(z, r) is z plus a linear map of r, so that r holds all that changes. `model.latent.dim` should be
    `model.embedding_dim`: with fewer dimensions, r holds the principal components of changes."""

    built_by: ClassVar[str] = "worldmodel.nets.editors:LinearEditor"
    takes_conditions: ClassVar[bool] = True

    name: Literal["linear"] = "linear"
    """Name of the editor."""


EditorConfig = (
    LinearEditorConfig
    | MlpEditorConfig
    | ResidualEditorConfig
    | BlocksEditorConfig
    | SumEditorConfig
    | LowRankEditorConfig
    | External
)


@dataclass(frozen=True, config=KEYS)
class ModelConfig:
    """The networks (AdaSSL, arXiv 2602.02381, appendix D.5)."""

    encoder: Annotated[EncoderConfig, Choice("conv3d")] = Conv3dConfig()
    """Network from a segment to features."""
    latent: Annotated[LatentConfig, Choice("gaussian")] = GaussianConfig()
    """Latent variable r, which captures what the past does not determine."""
    editor: Annotated[EditorConfig, Choice("mlp")] = MlpEditorConfig()
    """Network t from an embedding z and r to the next embedding."""
    embedding_dim: Size = 128
    """Dimensions of an embedding."""
    embedding_norm: EmbeddingNorm | None = None
    """Normalisation of embeddings. sphere: length sqrt(embedding_dim). standard: each dimension has mean 0 and variance
    1 over a batch, followed by a learned shift and scale, except for objectives with a teacher. white: dimensions are
    also uncorrelated. null: standard for the objective jepa, otherwise sphere."""
    hidden_dim: Size = 1024
    """Hidden units of projector, editor, prior and posterior."""
    projector_layers: Annotated[int, Field(strict=True, ge=0, le=64)] | None = 2
    """Hidden layers of the projector. 0: the embedding is linear in the features of the encoder. null: there is no
    projector, and the embedding is the normalised features. `embedding_dim` must be their number."""
    action_dim: SizeFrom0 = 0
    """Size of the action vector (per-frame label `data.action_label`) that conditions editor, prior and posterior. A
    step of the model takes those of all its source frames: `data.num_frames` times `data.frame_stride`. 0: learn from
    video alone."""
    scene_dim: SizeFrom0 = 0
    """Size of each part of a scene code, which conditions editor, prior and posterior. It is read from the features of
    the context: one part for the next step, one that is kept over a rollout, for what is constant in a clip. Learned in
    refinement (`train.refine_steps`). 0: no scene code."""
    distance_dim: SizeFrom0 = 0
    """Size of each of the 8 groups of a temporal distance: the minimum number of steps from one state to another
    (worldmodel/nets/distance.py). Learned in refinement (`train.refine_steps`); used by `planning.distance=steps`. 0:
    no temporal distance."""
