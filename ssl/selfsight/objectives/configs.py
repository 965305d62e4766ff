"""The fields of every built-in objective. They stand apart from the objectives so that `--help` need not import torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from selfsight.data.views import View
from selfsight.errors import UsageError
from selfsight.section import Section, explain

# The augmentations of joint embedding (SimCLR's, with the strengths of BYOL, DINO and VICReg); colour goes with three channels.
_STRONG: dict[str, Any] = {"crop_scale": (0.2, 1.0), "jitter": 0.8, "grayscale": 0.2, "blur": 0.5}


class ObjectiveConfig(Section):
    """What all objectives have: a name."""

    name: str
    """Which objective."""

    @model_validator(mode="before")
    @classmethod
    def _complete_views(cls, tree: Any) -> Any:
        """A view that is given in part keeps the rest of the objective's own, not of the plain default."""
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        for name, field in cls.model_fields.items():
            default = tree.get("view") if name == "second_view" and field.default is None else field.default
            if isinstance(default, View):
                default = default.model_dump()
            if isinstance(default, dict) and isinstance(tree.get(name), dict):
                tree[name] = default | tree[name]
        return tree


class MAEConfig(ObjectiveConfig):
    """Masked autoencoder (He et al. 2022, arXiv 2111.06377): rebuild the pixels of hidden patches from the visible ones."""

    name: Literal["mae"] = "mae"
    """Which objective."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that is hidden."""
    masking: Literal["random", "tube"] = "random"
    """Of volumes and channel tokens: patches one by one, or the same places in every plane (tubes, VideoMAE, arXiv 2203.12602)."""
    predict_ratio: float = Field(1.0, gt=0, le=1)
    """Share of the hidden patches that the decoder rebuilds (dual masking, VideoMAE V2, arXiv 2303.16727)."""
    decoder: Literal["self", "cross"] = "self"
    """What a hidden patch attends to: all patches (the paper), or the visible ones alone (CrossMAE, arXiv 2401.14391), which
    costs less, and much less with a `predict_ratio` of a third; each block then sees its own sum of all the encoder's blocks."""
    decoder_width: int = Field(512, ge=8, le=32768)
    """Width of the decoder's tokens."""
    decoder_depth: int = Field(8, ge=1, le=256)
    """Transformer blocks in the decoder."""
    decoder_heads: int = Field(16, ge=1, le=1024)
    """Attention heads in the decoder."""
    normalize_patches: bool = True
    """Each target patch has mean 0 and variance 1, which puts detail before brightness."""
    loss: Literal["l2", "l1", "ms-ssim"] = "l2"
    """Distance between prediction and target; ms-ssim compares the rebuilt image as a whole, in 0..1."""
    edges: float = Field(0.0, ge=0)
    """Weight of a second target, the magnitude of the image's gradient (Sobel); 0: none."""
    view: View = View()
    """The one view."""


class SimMIMConfig(ObjectiveConfig):
    """SimMIM (Xie et al. 2022, arXiv 2111.09886): regress the pixels of masked squares from mask tokens, by one linear layer."""

    name: Literal["simmim"] = "simmim"
    """Which objective."""
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    """Share of the squares that is masked, rounded up to whole squares."""
    mask_size: int = Field(32, ge=1)
    """Side of a masked square, pixels; a multiple of the encoder's patch."""
    view: View = View(crop_scale=(0.67, 1.0))
    """The one view."""


class VICRegConfig(ObjectiveConfig):
    """VICReg (Bardes et al. 2022, arXiv 2105.04906): two views agree, and no dimension is dead or repeats another."""

    name: Literal["vicreg"] = "vicreg"
    """Which objective."""
    invariance: float = Field(25.0, ge=0)
    """Weight of the squared distance between the two views' embeddings."""
    variance: float = Field(25.0, ge=0)
    """Weight of the hinge that keeps each dimension's standard deviation above 1."""
    covariance: float = Field(1.0, ge=0)
    """Weight of the squared covariances between dimensions."""
    expander_width: int = Field(2048, ge=2, le=131072)
    """Width of the embeddings and of the expander's hidden layers; the paper has 8192."""
    expander_layers: int = Field(3, ge=1, le=64)
    """Linear layers of the expander."""
    view: View = View(**_STRONG)
    """The first view."""
    second_view: View | None = None
    """The second view; null: made as the first. Of clips, another moment; with `shift`, another frame of a clip in a folder."""
    order: float = Field(0.0, ge=0)
    """Weight of temporal order verification, for clips (Misra, Zitnick, Hebert 2016, arXiv 1603.08561): the views show the
    first two of three moments, a third view the last one, and a linear layer says whether they are in order. 0: none."""


class RotationConfig(ObjectiveConfig):
    """Rotation (Gidaris et al. 2018, arXiv 1803.07728): say by which multiple of 90 degrees the image was turned."""

    name: Literal["rotation"] = "rotation"
    """Which objective."""
    turns: Literal["one", "all"] = "one"
    """One turn for each image, drawn anew each time, or all four of each image in every batch (four times the work)."""
    view: View = View()
    """The one view, before it is turned."""


class DistillConfig(ObjectiveConfig):
    """Distillation from a frozen teacher: its embeddings, patch tokens, similarities, or class probabilities."""

    name: Literal["distill"] = "distill"
    """Which objective."""
    teacher: str
    """The teacher: a run folder, an exported encoder, a checkpoint, a timm model's folder, or a timm model's name (downloads)."""
    stored: str | None = None
    """Folder of the teacher's outputs, written once by `selfsight teacher`; training then runs no teacher. null: run it."""
    augmentations: int | None = Field(None, ge=1)
    """So many augmentations of each image, one an epoch in turn, as a stored teacher needs; null: every epoch has its own."""
    embedding: float = Field(1.0, ge=0)
    """Weight of the distance between the image's features and the teacher's."""
    patches: float = Field(0.0, ge=0)
    """Weight of the distance between patch tokens and the teacher's, resampled to the student's grid."""
    similarity: float = Field(0.0, ge=0)
    """Weight of the distance between the batch's cosine similarities and the teacher's (after Tung & Mori 2019, arXiv 1907.09682)."""
    logits: float = Field(0.0, ge=0)
    """Weight of the cross-entropy with the teacher's class probabilities (Hinton et al. 2015); the teacher needs a classifier."""
    distance: Literal["cosine", "l2"] = "cosine"
    """Of features and patch tokens: 1 - cosine, or the mean squared difference."""
    temperature: float = Field(1.0, gt=0)
    """Softens the class probabilities of teacher and student."""
    top_k: int | None = Field(None, ge=1)
    """Keep so many of the teacher's class probabilities; what is left is spread evenly over the other classes. null: all."""
    view: View = View()
    """The one view, the same for teacher and student."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "DistillConfig":
        if not (self.embedding or self.patches or self.similarity or self.logits):
            raise ValueError("one of embedding, patches, similarity, logits must be above 0")
        if self.stored and self.augmentations is None:
            raise ValueError("stored: needs augmentations, the number of stored augmentations of each image")
        return self


class EMATeacherConfig(ObjectiveConfig):
    """What objectives have whose teacher is a running average of the student."""

    momentum: float = Field(0.996, ge=0, le=1)
    """Decay of the teacher's running average at the first step; rises to 1 along a cosine."""


class DINOConfig(EMATeacherConfig):
    """DINO (Caron et al. 2021, arXiv 2104.14294), with the patch loss of iBOT and the spread of DINOv2 if asked."""

    name: Literal["dino"] = "dino"
    """Which objective."""
    outputs: int = Field(65536, ge=2, le=2**20)
    """Prototypes: width of the head's output."""
    head_width: int = Field(2048, ge=1, le=131072)
    """Width of the head's hidden layers."""
    head_layers: int = Field(3, ge=1, le=64)
    """Linear layers of the head before the prototypes."""
    head_norm: bool = False
    """Batch normalisation in the head, over the global batch: small models and sets do not start without it."""
    bottleneck: int = Field(256, ge=1, le=32768)
    """Width of the vectors that are compared with the prototypes."""
    normalize_prototypes: bool = True
    """Prototypes have length 1; without it small models learn a little more, large ones diverge."""
    freeze_prototypes: float = Field(0.01, ge=0, le=1)
    """Share of the steps in which the prototypes are not trained."""
    student_temperature: float = Field(0.1, gt=0)
    """Sharpness of the student's distribution."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """Sharpness of the teacher's distribution at the first step and after its warmup."""
    teacher_warmup: float = Field(0.3, ge=0, le=1)
    """Share of the steps in which the teacher's temperature rises."""
    balance: Literal["centering", "sinkhorn"] = "centering"
    """What keeps the teacher from one answer to all: a running mean taken off its outputs, or Sinkhorn-Knopp on the batch."""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of that running mean."""
    local_views: int = Field(8, ge=0, le=64)
    """Small views of each image, for the student only."""
    ibot: float = Field(0.0, ge=0)
    """Weight of the loss on masked patch tokens (iBOT, Zhou et al. 2022, arXiv 2111.07832); 0: none."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of the patches that iBOT masks in a global view, least and most."""
    mask_probability: float = Field(0.5, ge=0, le=1)
    """Share of the global views that iBOT masks."""
    koleo: float = Field(0.0, ge=0)
    """Weight of KoLeo (Sablayrolles et al. 2019, arXiv 1806.03198), which spreads the features of a batch; 0: none."""
    view: View = View(**_STRONG | {"crop_scale": (0.4, 1.0), "blur": 1.0})
    """The first global view."""
    second_view: View = View(**_STRONG | {"crop_scale": (0.4, 1.0), "blur": 0.1, "solarize": 0.2})
    """The second global view."""
    local_view: View = View(**_STRONG | {"crop_scale": (0.05, 0.4), "size": 96})
    """Each local view; its `size` is a multiple of the patch."""

    @model_validator(mode="after")
    def _ordered(self) -> "DINOConfig":
        if not 0 < self.mask_ratio[0] <= self.mask_ratio[1] < 1:
            raise ValueError("mask_ratio must be two shares, 0 < least <= most < 1")
        if min(self.teacher_temperature) <= 0:
            raise ValueError("teacher_temperature must be two temperatures above 0")
        return self


class Data2VecConfig(EMATeacherConfig):
    """data2vec (Baevski et al. 2022, arXiv 2202.03555): predict the features that an average teacher has of masked patches."""

    name: Literal["data2vec"] = "data2vec"
    """Which objective."""
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    """Share of the squares that is masked, rounded up to whole squares."""
    mask_size: int = Field(32, ge=1)
    """Side of a masked square, pixels; a multiple of the encoder's patch."""
    beta: float = Field(2.0, gt=0)
    """Where the smooth L1 loss turns from squares to absolute values."""
    view: View = View()
    """The one view."""


def _named(tree: Any) -> Any:
    """The typed fields of an objective inside another."""
    from selfsight.objectives import config_type, parse_objective

    if not isinstance(tree, dict):
        return tree
    try:
        return parse_objective(tree)
    except ValidationError as error:
        raise ValueError("; ".join(explain(error, "", config_type(tree.get("name"))))) from None
    except UsageError as error:
        raise ValueError(str(error)) from None


class JointPart(Section):
    """One objective of a joint."""

    objective: Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(_named)]
    """The objective, with its own fields."""
    weight: float | tuple[float, float] = 1.0
    """Factor on its loss; two values: from the first at the start, linearly, to the second at the end."""


class JointConfig(ObjectiveConfig):
    """A weighted sum of objectives on one encoder, sharing views and forward passes where they can."""

    name: Literal["joint"] = "joint"
    """Which objective."""
    parts: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], JointPart] = Field(min_length=1)
    """The objectives by a name of your own (letters, digits, - and _), which is that of their terms in the metrics."""
