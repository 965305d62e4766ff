"""From a recipe to the parts of a run, and from the parts to a checkpoint and back."""

import copy
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

import numpy as np
import PIL
import timm
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight import __version__, checkpoint
from selfsight.data import jpeg
from selfsight.data.crops import ViewMaker
from selfsight.data.device_jpeg import require_decoder
from selfsight.data.loader import Batches
from selfsight.data.mixture import Mixture, Samples
from selfsight.data.pixel_cache import find_cache
from selfsight.data.placer import Placer
from selfsight.data.stats import fill_in
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import StorageError, UsageError
from selfsight.eval.evaluate import scorable_sets
from selfsight.objectives import build_objective
from selfsight.objectives.base import Objective, Setting
from selfsight.optim import build_optimizer
from selfsight.past import Past
from selfsight.precision import ARITHMETIC, resolve
from selfsight.recipe import Recipe, merge, validate
from selfsight.recipe_data import asked_for, has_planes, open_samples, own_statistics
from selfsight.run_folder import differences
from selfsight.sharding import copy_whole, gathered, is_sharded, load_whole, shard, sharded_by
from selfsight.switches import switch
from selfsight.weights import load_weights


@dataclass
class Parts:
    """Everything that a run is made of. Only what `tensors` returns changes while it trains."""

    recipe: Recipe
    shards: Samples
    encoder: Encoder
    objective: Objective
    optimizer: torch.optim.AdamW
    average: Encoder | None
    """Running average of the encoder, if the recipe wants one."""
    steps: int
    """Optimizer steps of the whole run."""
    notes: list[str]
    """What was done to the weights that the encoder started from."""
    allow_change: tuple[str, ...] = ()
    """Fields in which a checkpoint may be another recipe's."""
    past: Past = field(default_factory=Past)

    @property
    def scored(self) -> Encoder:
        """The encoder that is scored and exported."""
        return self.average or self.objective.scored

    @property
    def sharded(self) -> bool:
        """Whether each rank has only its share of the weights."""
        return is_sharded(self.objective)

    def scored_whole(self, keep: bool) -> Encoder | None:
        """`scored`, or where it is sharded a copy that is not. Then every rank must ask for it; None on those that do not keep it."""
        if not self.sharded:
            return self.scored
        device = next(self.encoder.parameters()).device
        copied = build_encoder(self.recipe.encoder, self.encoder.preprocessing, 0).to(device) if keep else None
        copy_whole(self.scored, copied)
        return copied

    @property
    def names(self) -> dict[Tensor, str]:
        """Names of the trained parameters."""
        return {parameter: name for name, parameter in self.objective.named_parameters()}

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step * self.recipe.train.batch_size / len(self.shards)

    def batches(self, rank: int = 0, world: int = 1) -> Batches:
        """The training batches of one rank."""
        recipe, made = self.recipe, self.encoder.preprocessing
        makers = tuple(
            ViewMaker(view, number, made.image_size, made.interpolation, recipe.seed)
            for number, view in enumerate(self.objective.views)
        )
        data, train = recipe.data, recipe.train
        return Batches(
            self.shards, makers, recipe.seed, made.form, train.batch_size, rank, world, train.accumulate,
            augmentations=self.objective.augmentations,
            step=made.step,
            repeat=data.repeat,
            reduce=data.fast_decode and data.repeat == 1,  # else it would depend on which repeats share a micro-batch
            # Reduced pixels and those of a device are not the cache's.
            cache=find_cache(self.shards, made.form) if data.cache == "auto" and data.plain_pixels else None,
            encode=data.decode == "device",
        )  # fmt: skip

    def placer(self, device: torch.device) -> Placer:
        """What makes a batch for the objective, on the device."""
        made = self.encoder.preprocessing
        if own := own_statistics(self.recipe.data.mix, made, device):
            assert isinstance(self.shards, Mixture)
            return Placer(self.objective.views, *own, self.recipe.seed, made.values, made.interpolation, self.shards)
        return Placer(self.objective.views, *made.statistics(device), self.recipe.seed, made.values, made.interpolation)

    def fingerprint(self, recipe: Recipe | None = None) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it. Where the data lie is not part of it."""
        tree = (recipe or self.recipe).model_dump(mode="json")
        train = {key: tree["train"][key] for key in ("batch_size", "precision", "ema")} | {"steps": self.steps}
        encoder = self.recipe.encoder
        # Then micro-batches are not only a matter of memory: each compares its images, or draws the channels that it shows.
        if self.objective.compares_images or (encoder.channel_tokens and encoder.channel_sampling):
            train["accumulate"] = tree["train"]["accumulate"]
        if tree["train"]["deterministic"]:  # sums of other parts are rounded in another way
            train["deterministic"] = tree["train"]["deterministic"]
        data = tree["data"] | {"train": self.shards.id}
        del data["bad_share"], data["cache"]
        data["mix"] = [{key: value for key, value in part.items() if key != "train"} for part in data["mix"]]
        parts = {key: tree[key] for key in ("encoder", "objective", "optim")}
        given = {"given to the objective": self.objective.outside} if self.objective.outside else {}
        return {"seed": tree["seed"], "data": data, "train": train} | parts | given

    def tensors(self, keep: bool = True) -> dict[str, checkpoint.Tensors]:
        """What a checkpoint stores, by file; where it is sharded, copies on the CPU.

        Args:
            keep: whether this rank wants them; where they are sharded, every rank must call.
        """
        stored = {"model": self.objective.state_dict(), "optim": checkpoint.pack_optimizer(self.optimizer, self.names)}
        stored |= {"ema": self.average.state_dict()} if self.average else {}
        return {file: gathered(group, keep) for file, group in stored.items()} if self.sharded else stored

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {
            "version": __version__,
            "libraries": libraries(),
            "fingerprint": self.fingerprint(),
            "past": asdict(self.past),
            "recipe": self.recipe.model_dump(mode="json"),
            "scored": next(name for name, module in self.objective.named_modules() if module is self.objective.scored),
        }

    def restore(self, saved: checkpoint.Checkpoint, where: str) -> int:
        """Take a checkpoint's place; the answer is the number of steps done.

        Raises:
            UsageError: a checkpoint of another recipe; every differing key is named.
        """
        if not all(isinstance(saved.state.get(key), dict) for key in ("recipe", "fingerprint")):
            raise StorageError(f"{where}: its checkpoint does not say of which recipe it is")
        # Fields that are younger than the checkpoint had, when it was written, what is their default now.
        younger = self.fingerprint(validate(saved.state["recipe"], where))
        other = differences(merge(younger, saved.state["fingerprint"]), self.fingerprint())
        refused = [told for key, told in other.items() if not key.startswith(self.allow_change)]
        if refused:
            raise UsageError(
                f"{where}: is the run of another recipe: {'; '.join(refused)}\n"
                "choose another --run_dir, give the recipe as it was (it is in the run folder), or accept it with --allow-change KEY"
            )
        self.notes = [f"goes on with a change: {told}" for told in other.values()]
        versions = differences(saved.state.get("libraries", libraries()), libraries())
        self.notes += [f"warning: {told}: results may differ in the last bits" for told in versions.values()]
        self.past.restore(saved.state.get("past", {}))
        step: int = saved.state["step"]
        if step > self.steps:
            raise StorageError(f"{where}: its checkpoint is of step {step:,}, and the run has {self.steps:,}")
        try:
            load_whole(self.objective, saved.tensors["model"])
            checkpoint.unpack_optimizer(self.optimizer, self.names, saved.tensors["optim"])
            if self.average:
                load_whole(self.average, saved.tensors["ema"])
        except (KeyError, RuntimeError) as error:
            raise StorageError(f"{where}: its checkpoint lacks something: {' '.join(str(error).split())}") from None
        if step and not saved.tensors["optim"] and not self.past.left_out:  # older runs of bad steps only have none
            raise StorageError(f"{where}: its checkpoint lacks the optimizer's state")
        return step


def libraries() -> dict[str, str]:
    """Versions on which pixels and rounding depend."""
    return {"torch": torch.__version__, "pillow": PIL.__version__, "numpy": np.__version__, "timm": timm.__version__}


def assemble(
    recipe: Recipe, device: torch.device, allow_change: tuple[str, ...] = (), world: int = 1, trains: bool = True
) -> Parts:
    """Build every part on the device, with the weights that the recipe's seed gives.

    Args:
        world: processes that train together, among which large models are shared out; 1: all is whole here.
        trains: False for parts that are only scored: then their blocks are neither compiled nor measured.

    Raises:
        UsageError, DataError: whatever in the recipe cannot be built, before the first step.
    """
    shards = open_samples(recipe.data)
    recipe = recipe.model_copy(
        update={"data": fill_in(recipe.data, recipe.encoder.channels, shards.sets, recipe.encoder.frames)}
    )
    batch = recipe.train.batch_size
    if len(shards) < batch:
        raise UsageError(f"train.batch_size: {batch} images, but {shards.spec} has only {len(shards)}")
    if recipe.eval.train:  # what cannot be scored is better known before the training than after it
        with asked_for("eval", "say where yours are (--eval.train, --eval.test), or set both to null: no scores"):
            scorable_sets(recipe.eval.train, recipe.eval.test or recipe.eval.train, recipe.eval.k)
    if recipe.data.fast_decode and not jpeg.library():
        raise UsageError("data.fast_decode: needs simplejpeg: pip install 'selfsight[fast]'")
    if recipe.data.decode == "device":
        require_decoder(device)
    steps = recipe.train.steps or ceil((recipe.train.epochs or 0) * len(shards) / batch)
    encoder = build_encoder(recipe.encoder, preprocessing_of(recipe.data, recipe.encoder), recipe.seed)
    notes = []
    if recipe.encoder.weights and not checkpoint.steps(recipe.run_dir / "checkpoints"):  # else the checkpoint has them
        notes = load_weights(encoder, recipe.encoder.weights, recipe.encoder.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        objective = build_objective(recipe.objective, encoder)
    moments = any(view.moment is not None for view in objective.views)
    clips = has_planes(shards, encoder.preprocessing) if moments else None
    notes += objective.check(
        Setting(batch // recipe.train.accumulate, shards.id, recipe.seed, clips, recipe.data.plain_pixels)
    )
    if any(view.shift for view in objective.views):
        notes.append("view.shift: neighbours are told by label; labels must be clips, not classes that are scored")
    if not objective.uses_head:
        encoder.freeze_head()
    if recipe.train.deterministic and any(isinstance(module, _BatchNorm) for module in objective.modules()):
        raise UsageError(
            f"train.deterministic: {recipe.encoder.name} has batch norms, whose running statistics each process makes of its "
            "own images; choose a vit_*, or leave train.deterministic at 0"
        )
    if objective.uses_pixels and any(part.mean or part.std for part in recipe.data.mix):
        raise UsageError(
            f"data.mix: {objective.config.name} turns views back into pixels, which needs one mean and std for all sets; "
            "give data.mean and data.std"
        )
    average = copy.deepcopy(encoder).requires_grad_(False) if recipe.train.ema else None
    train, parameters = recipe.train, sum(parameter.numel() for parameter in encoder.parameters())
    if sharded_by(train.parallel, parameters, world, device.type, bool(train.deterministic)):
        half = ARITHMETIC[resolve(train.precision, device)][0] == "bf16"
        shard(objective, average, device, half)
    for module in (objective, *([average] if average else [])):
        module.to(device)
    if trains:
        notes += switch(recipe, objective, average, device)
    optimizer = build_optimizer(objective, encoder, recipe.optim)
    return Parts(recipe, shards, encoder, objective, optimizer, average, steps, notes, allow_change)


def unsharded(parts: Parts, device: torch.device) -> Parts:
    """The same parts, whole on every rank, for what comes after the last step; every rank must take part.

    The optimizer's state is lost: nothing is trained any more.
    """
    if not parts.sharded:
        return parts
    parts.optimizer.state.clear()
    found = assemble(parts.recipe, device, parts.allow_change, trains=False)
    found.past, found.notes = parts.past, parts.notes
    copy_whole(parts.objective, found.objective)
    if parts.average:
        copy_whole(parts.average, found.average)
    return found
