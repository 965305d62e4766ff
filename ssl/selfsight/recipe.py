"""Recipes: typed, frozen YAML with `base:` inheritance and dotted overrides. Every knob is declared here, once.

recipe = load("recipes/digits/mae.yaml", {"optim.lr": "1e-3"})
"""

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

import selfsight
from selfsight import plainyaml
from selfsight.errors import UsageError
from selfsight.objectives import config_type, parse_objective
from selfsight.objectives.configs import ObjectiveConfig
from selfsight.section import Section, explain, field_names

MAX_BASES = 8


class MixPart(Section):
    """One set of a mixture."""

    train: str | list[str]
    """Its shards, as data.train."""
    weight: float | None = Field(None, gt=0)
    """What an epoch holds of it, relative to the other sets; null: as many as it has samples."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel in this set; null: data.mean."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel in this set; null: data.std."""


class DataConfig(Section):
    """Which images, and how they become tensors."""

    train: str | list[str] | None = None
    """Shards to learn from: paths with {000..009} braces, globs or folders, or digits:train. Labels are not used, but for view.shift."""
    mix: tuple[MixPart, ...] = ()
    """In place of data.train several sets, `[{train: A, weight: 2}, {train: B}]`: an epoch has as many images as all have
    together, of each set in proportion to its weight."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, of pixels in 0..1; null: at 8 bits ImageNet's for three channels and 0.5 for one, otherwise the
    shards' own (shards check --stats)."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, of pixels in 0..1; null: as data.mean."""
    block: int = Field(1, ge=1, le=65536)
    """Neighbours in the shards that stay near each other in the order, to be read together over a network; 1: full shuffling."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized, in training and in evaluation."""
    crop_pct: float = Field(1.0, gt=0, le=1)
    """In evaluation, the share of the shorter side that the central crop keeps."""
    depth: Literal[8, 16, 32] = 8
    """Bits in which pixels are kept until they are normalised: 8, 16, or 32 for floating point."""
    range: tuple[float, float] | None = None
    """Stored values that become 0 and 1 before mean and std, such as -1000, 2000 of a CT; null: all of the depth, and at 32
    the 0.1 and 99.9 percentiles of the shards' own (shards check --stats)."""
    frame_step: int = Field(1, ge=1, le=1024)
    """Of clips and volumes, planes from one plane of the input to the next; fewer where a clip is too short for it."""
    repeat: int = Field(1, ge=1, le=64)
    """Views of a sample that stand side by side in a batch, each with its own crop, from one decoding (Hoffer et al. 2020). An epoch
    still has as many images as the set has samples, so that each sample comes every `repeat` epochs."""
    cache: Literal["auto", "off"] = "auto"
    """Use the pixels that `selfsight shards cache` has stored of small images, if it has; the images are the same."""
    fast_decode: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 of their size where every crop stays as large as its view: faster for large photographs, slightly
    other pixels; without effect beside repeat (extra: pip install 'selfsight[fast]')."""
    decode: Literal["workers", "device"] = "workers"
    """Who decodes JPEGs: loader workers, or the device, by nvJPEG on a GPU; then damaged ones end the run, and a device that cannot
    is refused at the start (extra: pip install 'selfsight[fast]')."""
    bad_share: float = Field(0.001, ge=0, le=1)
    """Share of bad samples (never fewer than 10) above which the run ends with exit code 65; below it they are replaced."""

    @property
    def plain_pixels(self) -> bool:
        """Whether JPEGs are decoded in full by the workers, so that pixels are the same wherever they come from."""
        return not self.fast_decode and self.decode == "workers"

    @model_validator(mode="after")
    def _something(self) -> "DataConfig":
        if (self.train is None) == (not self.mix):
            raise ValueError("give either train or mix (beside a recipe's own train: --data.train null)")
        return self

    @field_validator("range")
    @classmethod
    def _rising(cls, range: tuple[float, float] | None) -> tuple[float, float] | None:
        if range and not 0 < range[1] - range[0] < inf:
            raise ValueError("give two finite numbers, the lower first")
        return range


class EncoderConfig(Section):
    """The Vision Transformer: any timm model by name, with any of its dimensions changed."""

    name: str = "vit_tiny_patch16_224"
    """A timm model; what follows changes it."""
    image_size: int = Field(224, ge=1, le=8192)
    """Side of the square input, pixels."""
    channels: int = Field(3, ge=1, le=32)
    """Input channels."""
    frames: int = Field(1, ge=1, le=1024)
    """Planes of the input: slices of a volume or frames of a clip; 1: a plain image."""
    tube: int = Field(1, ge=1, le=256)
    """Planes in a patch; frames is a multiple of it."""
    channel_tokens: bool = False
    """Each channel has tokens of its own, by one stem for all and an embedding of the channel (ChannelViT, arXiv 2309.16108)."""
    channel_sampling: bool = True
    """With channel_tokens, objectives that embed whole views show a random number of random channels in each batch, so that
    any of the channels will do later."""
    patch: int | None = Field(None, ge=1, le=1024)
    """Side of a patch, pixels; null: as the model has it."""
    width: int | None = Field(None, ge=8, le=32768)
    """Width of a token; null: as the model has it."""
    depth: int | None = Field(None, ge=1, le=1024)
    """Transformer blocks; null: as the model has it."""
    heads: int | None = Field(None, ge=1, le=1024)
    """Attention heads; null: as the model has it."""
    class_token: bool | None = None
    """Whether there is a class token; null: as the model has it."""
    registers: int | None = Field(None, ge=0, le=4096)
    """Register tokens (Darcet et al. 2024); null: as the model has it."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: the share of samples that skip the last block, growing linearly from 0 at the first."""
    positions: Literal["sincos", "learned"] = "sincos"
    """Position embeddings: fixed 2D sine-cosine, or learned. A table that came with weights is kept, fixed or learned."""
    init: Literal["xavier", "timm"] = "xavier"
    """Initial weights: MAE's (Xavier uniform, the stem too), or timm's own."""
    weights: str | None = None
    """Start from these: a timm tag (`timm`: the model's default; downloads), a .safetensors file, or an exported folder."""
    pool: Literal["cls", "mean", "cls+mean", "head"] = "mean"
    """How tokens become the feature of an image; head: the timm model's own way."""

    @model_validator(mode="after")
    def _whole_tubes(self) -> "EncoderConfig":
        if self.frames % self.tube:
            raise ValueError(f"frames {self.frames} is not a multiple of tube {self.tube}")
        if self.channel_tokens and self.frames > 1:
            raise ValueError("channel_tokens and frames: the tokens are those of channels or of planes; choose one")
        return self


class OptimConfig(Section):
    """AdamW with warmup and cosine decay; each a pure function of the step."""

    lr: float = Field(1.5e-4, gt=0)
    """Peak learning rate, for the batch size as given (nothing is scaled behind your back)."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the last step."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises linearly from 0."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; norms, biases, tokens and position embeddings are spared."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the last step, reached along half a cosine; null: it stays the same."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each block to the one before it; below 1 when continuing from weights."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm; larger ones are scaled down to it."""


class TrainConfig(Section):
    """The loop."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the data; or give steps."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; or give epochs."""
    batch_size: int = Field(256, ge=1)
    """Images in one optimizer step, over all ranks and micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches whose gradients are summed into one step, to fit in memory."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp8"] = "auto"
    """Arithmetic; auto: bf16 on a GPU, fp32 on a CPU. tf32 and fp8 (the blocks' large products) are a GPU's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: the GPU if there is one."""
    compile: bool = False
    """torch.compile for the transformer blocks: faster on a GPU after a minute of compiling."""
    cuda_graphs: bool = False
    """With compile, on a GPU: replay each step's kernels as CUDA graphs; for small models, whose launches take longer than they."""
    checkpoint_blocks: Literal["auto"] | bool = "auto"
    """Recompute blocks in the backward pass: all a third slower, far less memory; auto: as many as a GPU's memory asks for."""
    workers: int | None = Field(None, ge=0, le=256)
    """Loader processes for each rank; null: the cores shared among the machine's ranks, at most 8."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of torch in each rank; null: torch's choice, all cores. Tiny models are faster with 1."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a running average of the encoder's weights, which is then what is scored and exported; null: none."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """What several processes share out: the batch (ddp), or also weights, gradients and moments (fsdp: far less memory, and weights
    are gathered in every pass); auto: fsdp for encoders from 1e9 parameters on several GPUs."""
    deterministic: int = Field(0, ge=0)
    """Parts into which a batch is cut, a power of two (8 is usual), whose gradients are summed along one tree: the same weights
    bit for bit on every number of ranks that divides it. 0: off, faster."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """When a loss or gradient is not finite: leave out the step (at most 3 in 100), or stop with exit code 70."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """When the features of all images become the same: warn once, or stop with exit code 70."""
    log_every: int = Field(10, ge=1)
    """Steps between lines in metrics.jsonl."""
    save_every: int = Field(1000, ge=1)
    """Steps between checkpoints; the first is written at step 1."""
    keep: int = Field(2, ge=2)
    """Checkpoints that are kept, the newest."""
    keep_every: int | None = Field(None, ge=1)
    """Steps between checkpoints that are kept for ever, a multiple of save_every; null: none."""
    timeout: float = Field(120.0, gt=0)
    """Seconds that another rank may be silent, or a loader worker be without a batch, before it counts as frozen."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps (beside a recipe's own epochs: --train.epochs null)")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if self.deterministic and self.compile:
            raise ValueError("deterministic and compile: compiled blocks round in another way; choose one")
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs needs compile: --train.compile true")
        if self.cuda_graphs and (self.accumulate > 1 or self.checkpoint_blocks is True):
            raise ValueError(
                "cuda_graphs: gradients and blocks must not outlive a replay; leave out accumulate and checkpoint_blocks"
            )
        if self.deterministic and self.parallel == "fsdp":
            raise ValueError("deterministic and parallel fsdp: shards are not summed along one tree; choose ddp")
        if self.deterministic & (self.deterministic - 1):
            raise ValueError(f"deterministic {self.deterministic} is not a power of two")
        if self.deterministic and self.batch_size % (self.accumulate * self.deterministic):
            raise ValueError(
                f"batch_size {self.batch_size} does not split into {self.accumulate} x {self.deterministic} parts"
            )
        if self.keep_every and self.keep_every % self.save_every:
            raise ValueError(f"keep_every {self.keep_every} is not a multiple of save_every {self.save_every}")
        return self


class EvalConfig(Section):
    """What is scored during and after training; needs labels, which training itself never sees."""

    train: str | list[str] | None = None
    """Labelled shards that probes are fitted on; null: no scores."""
    test: str | list[str] | None = None
    """Labelled shards that are scored once, at the end."""
    every: int = Field(1000, ge=1)
    """Steps between online kNN scores (on a held-out tenth of eval.train, never on eval.test)."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Candidate numbers of neighbours; one is chosen on the held-out tenth."""
    online_samples: int = Field(5000, ge=20)
    """Samples that the online score uses at most."""

    @model_validator(mode="after")
    def _train_first(self) -> "EvalConfig":
        if self.test and not self.train:
            raise ValueError("eval.test: needs eval.train, on which the probes are fitted")
        return self


class Recipe(Section):
    """A pretraining run."""

    run_dir: Path
    """Folder of the run: started if new, resumed if not finished."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the order, and every random choice."""
    data: DataConfig
    encoder: EncoderConfig = EncoderConfig()
    objective: SerializeAsAny[ObjectiveConfig]
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers that get the metrics too, through Accelerate (extra: pip install 'selfsight[track]')."""

    def to_yaml(self) -> str:
        """The whole recipe, every default written out."""
        return plainyaml.dump(self.model_dump(mode="json"))


# Fields whose overrides are taken to the letter: globs, braces and odd folder names are not YAML.
_TEXTUAL = (str, str | None, Path, str | list[str], str | list[str] | None)


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and what it is based on, apply overrides, and check every field.

    Args:
        path: a YAML file, or the name of a packaged recipe such as `digits/mae`.
        overrides: dotted names to values; strings are read as YAML scalars.

    Raises:
        UsageError: with every wrong field, what was wrong, and the nearest right names.
    """
    tree = _with_bases(find(path), [])
    textual = {name for name, field in field_names(Recipe) if field.annotation in _TEXTUAL}
    for name, value in sorted((overrides or {}).items(), key=lambda item: not item[0].endswith("objective.name")):
        literal = not isinstance(value, str) or (name in textual and value != "null" and not value.startswith("["))
        _override(tree, name, value if literal else plainyaml.parse(value, f"--{name}"))
    return validate(tree, str(path))


def packaged() -> Path:
    """The folder of the recipes that come with the package."""
    folders = [Path(root) / "recipes" for root in selfsight.__path__]  # two in a checkout without symbolic links
    return next(folder for folder in folders if folder.is_dir())


def packaged_recipes() -> list[tuple[str, str]]:
    """Every packaged recipe with the first line of its head."""
    found = []
    for path in sorted(packaged().rglob("*.yaml")):
        found.append((str(path.relative_to(packaged())), path.read_text().splitlines()[0].lstrip("# ")))
    return found


def find(path: str | Path) -> Path:
    """The file of a recipe: as given, or among those of the package (with or without `recipes/` and `.yaml`)."""
    if Path(path).is_file():
        return Path(path)
    for name in (str(path), f"{path}.yaml"):
        if (packaged() / name.removeprefix("recipes/")).is_file() and not Path(name).is_absolute():
            return packaged() / name.removeprefix("recipes/")
    known = [name for name, _ in packaged_recipes()]
    near = get_close_matches(str(path).removeprefix("recipes/"), known, 3, 0.5)
    nearest = f"nearest: {', '.join('recipes/' + name for name in near)}; " if near else ""
    raise UsageError(f"{path}: no such recipe; {nearest}`selfsight recipes` lists all")


def validate(tree: dict[str, Any], where: str) -> Recipe:
    """A recipe from its parsed tree.

    Raises:
        UsageError: as for `load`.
    """
    problems: list[str] = []
    objective = tree.get("objective")
    if isinstance(objective, dict):
        try:
            tree = tree | {"objective": parse_objective(objective)}
        except UsageError as error:
            problems.append(f"objective.name: {error}")
        except ValidationError as error:
            problems += explain(error, "objective.", config_type(objective.get("name")))
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += [line for line in explain(error, "", Recipe) if not line.startswith("objective") or not problems]
        raise UsageError("\n".join(f"{where}: {line}" for line in problems)) from None
    if problems:
        raise UsageError("\n".join(f"{where}: {line}" for line in problems))
    return recipe


def _with_bases(path: Path, above: list[Path]) -> dict[str, Any]:
    if path.resolve() in above or len(above) >= MAX_BASES:
        raise UsageError(f"{path}: its chain of base: files is circular or longer than {MAX_BASES}")
    tree = plainyaml.read(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise UsageError(f"{path}: base: {base!r} is not a file beside it")
    return merge(_with_bases(path.parent / base, [*above, path.resolve()]), tree)


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """The tree `base` with what `top` says put over it."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        # Another objective has other fields: nothing of the base's is kept.
        other = key == "objective" and isinstance(value, dict) and isinstance(below, dict) and "name" in value
        if isinstance(below, dict) and isinstance(value, dict) and not (other and value["name"] != below.get("name")):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _override(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    if last == "name" and sections[-1:] == ["objective"] and tree.get("name") != value:
        tree.clear()  # another objective has other fields
    tree[last] = copy.deepcopy(value)
