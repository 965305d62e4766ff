"""`selfsight teacher`: a teacher's outputs, computed once and stored, so that training runs no teacher."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from selfsight import console
from selfsight.assemble import assemble
from selfsight.data.loader import Rows, loader
from selfsight.errors import UsageError
from selfsight.objectives.base import Setting
from selfsight.objectives.configs import DistillConfig
from selfsight.objectives.distill import Distill, origin
from selfsight.objectives.teacher import Outputs, StoredTeacher, Teacher, write_outputs
from selfsight.processes import join, loader_workers
from selfsight.quarantine import Quarantine
from selfsight.recipe import Recipe, load


def store_teacher(recipe: Recipe | str | Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Write the teacher's outputs for every sample and augmentation of a `distill` recipe into its `objective.stored`.

    Raises:
        UsageError: another objective, no `stored`, or a folder that holds another recipe's outputs.
        DataError: whatever is wrong with the data.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe, overrides)
    config = recipe.objective
    if not isinstance(config, DistillConfig) or not config.stored or not config.augmentations:
        raise UsageError(
            "objective: name: distill, with stored (the folder to write) and augmentations (so many of each image) is needed"
        )
    folder, live = (
        Path(config.stored),
        recipe.model_copy(update={"objective": config.model_copy(update={"stored": None})}),
    )
    accelerator, workers = join(recipe), loader_workers(recipe)
    device = accelerator.device
    parts = assemble(live, device)
    objective, samples = parts.objective, len(parts.shards)
    assert isinstance(objective, Distill)
    teacher = objective.teacher
    assert isinstance(teacher, Teacher)
    of = origin(config, parts.encoder, Setting(0, parts.shards.id, recipe.seed, plain_pixels=recipe.data.plain_pixels))
    about = {"weights": teacher.weights, "widths": teacher.widths}
    if folder.exists():
        stored = StoredTeacher(folder, config)
        stored.require(of)
        if stored.weights != about["weights"]:
            raise UsageError(f"objective.stored: {folder}: is of other weights of {config.teacher}; name a new folder")
        console.say(f"{folder}: holds this teacher's outputs already")
        return folder
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    rows = Rows(parts.batches(), samples * config.augmentations)
    place, quarantine = parts.placer(device), Quarantine(recipe.run_dir, 0)

    def outputs() -> Iterator[Outputs]:
        with console.progress("teaching", rows.rows) as bar:
            for host in loader(rows, range(len(rows)), workers, device.type == "cuda"):
                quarantine.record(host)
                yield objective.taught(place(host))
                bar(len(host.ids))

    with torch.no_grad(), accelerator.autocast():  # in the precision in which it would teach live
        write_outputs(folder, of, about, rows.rows, outputs())
    console.say(f"{folder}: {rows.rows:,} rows, {config.augmentations} augmentations of {samples:,} samples")
    return folder
