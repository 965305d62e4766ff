"""Fine-tuning: all weights trained on the labels from where pretraining left them (the recipe of BEiT and MAE, in small).

Bao et al. 2022, arXiv 2106.08254, appendix H; He et al. 2022, arXiv 2111.06377, table 9: AdamW whose rate falls from block
to block towards the stem, stochastic depth, random crops, RandAugment, mixup or CutMix, smoothed labels. Of a random-init
encoder it is training from scratch, the rival that pretraining has to beat.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from selfsight import keyed
from selfsight.data.order import Ids
from selfsight.drop_path import Draw
from selfsight.encoder import Encoder, build_encoder
from selfsight.errors import NumericError, UsageError
from selfsight.eval import multilabel
from selfsight.eval.augmented import Drawn, Images, ShardImages, batch_of, steps_of
from selfsight.eval.labels import dense_labels, held_out
from selfsight.eval.protocol import detail_of, tenth
from selfsight.eval.subject import SEEDS, Outcome, Subject
from selfsight.optim import build_optimizer, lr_at, set_rates
from selfsight.recipe import OptimConfig

EPOCHS = 20
RATES = (3e-4, 1e-3, 3e-3)
SHORT = 4  # a rate is tried for one epoch in so many
DROP_PATH, SMOOTHING = 0.1, 0.1
MIXUP, CUTMIX = 0.8, 1.0  # alpha of the beta distribution of each; one or the other for a batch
OPTIM = OptimConfig(warmup=0.1, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=0.75)


class Tuned(NamedTuple):
    """What fine-tuning gave."""

    answers: list[Tensor]
    """Of each seed, logits of the test images (M, C)."""
    rate: float
    """The learning rate, chosen on the held-out tenth."""


class Classifier(nn.Module):
    """An encoder, and a linear layer on one of its pools.

    Args:
        encoder: training changes it; see `copied`.
        seed: of the layer's first weights.
        several: whether an image may have several classes; each is then a question of its own.
        pool: None: the encoder's own.
    """

    def __init__(
        self, encoder: Encoder, classes: int, seed: int, several: bool = False, pool: str | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.several, self.pool = encoder, several, pool or encoder.pool
        self.head = nn.Linear(width := encoder.width_of(self.pool), classes)
        start = keyed.uniform(seed, "fine-tuned head", range(classes), width)
        self.head.weight.data.copy_(torch.from_numpy(0.02 * start - 0.01))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """Normalised images (B, C, S, S) or with planes: logits (B, classes)."""
        return self.head(self.encoder.embed(images, self.pool, draw))

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy with targets (B, C) that sum to 1, or of each class by itself; smoothed towards an even guess."""
        if not self.several:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return F.binary_cross_entropy_with_logits(logits, targets * (1 - smoothing) + smoothing / 2)


def finetune(
    encoder: Encoder,
    train: Images,
    labels: Tensor,
    test: Callable[[], Iterable[Tensor]],
    epochs: int = EPOCHS,
    seeds: int = SEEDS,
    groups: Tensor | None = None,
    rates: Sequence[float] = RATES,
    pool: str | None = None,
) -> Tuned:
    """Choose the learning rate on a held-out tenth of train, fit on all of train once a seed, and answer for test.

    A rate is tried for a quarter of the epochs. The last epoch answers, never the best one. The encoder itself stays as it is.

    Args:
        train: `TensorImages`, or `ShardImages`, which augment.
        labels: (N,) int64 of 0 to C - 1, or (N, C) bool where an image has several.
        test: gives normalised images in batches; asked once a seed, after everything is chosen.
        groups: of the training samples, as for `held_out`.
        pool: that the linear layer is on; None: the encoder's own.

    Raises:
        UsageError: fewer than one epoch.
        NumericError: training diverges at every rate, or at the chosen one.
    """
    check_epochs(epochs)
    several = labels.ndim == 2
    targets = labels.float() if several else F.one_hot(labels).float()

    def fitted(ids: Ids, rate: float, seed: int, passes: int) -> Classifier:
        model = Classifier(copied(encoder), targets.shape[1], seed, several, pool).to(device)
        steps = steps_of(ids, passes)
        train_classifier(model, train.drawn(ids, steps, seed), targets, steps, rate, seed)
        return model

    device = next(encoder.parameters()).device
    fit, choose = (ids.numpy() for ids in held_out(len(labels), groups=groups))
    tried = {}
    for rate in rates if len(rates) > 1 else ():
        try:
            model = fitted(fit, rate, 0, max(1, epochs // SHORT))
            tried[rate] = _goodness(model, answered(model, train.shown(choose)), targets[choose])
        except NumericError:  # this rate is too high; others may not be
            tried[rate] = -inf, -inf
    best = max(tried, key=lambda rate: tried[rate]) if tried else rates[0]
    everything = np.arange(len(labels))
    return Tuned([answered(fitted(everything, best, seed, epochs), test()) for seed in range(seeds)], best)


def check_epochs(epochs: int) -> None:
    """Raise UsageError for fewer than one."""
    if epochs < 1:
        raise UsageError(f"epochs: {epochs}; fine-tuning takes at least one")


def copied(encoder: Encoder, drop_path: float = DROP_PATH) -> Encoder:
    """The encoder's weights in an encoder of its own with stochastic depth, where its backbone has any."""
    try:
        fresh = build_encoder(encoder.config.model_copy(update={"drop_path": drop_path}), encoder.preprocessing, 0)
    except UsageError:  # a backbone without stochastic depth
        fresh = build_encoder(encoder.config, encoder.preprocessing, 0)
    fresh.load_state_dict(encoder.state_dict())
    return fresh.to(next(encoder.parameters()).device)


def train_classifier(
    model: Classifier, batches: Iterable[Drawn], targets: Tensor, steps: int, rate: float, seed: int
) -> None:
    """Train in place, one step a batch, the rate rising over a tenth of `steps` and falling along half a cosine to 0.

    Randomness comes from (seed, position) alone.

    Args:
        targets: (N, C) float of all samples, one-hot or of several classes, on the CPU.

    Raises:
        NumericError: a loss that is not finite.
    """
    config = OPTIM.model_copy(update={"lr": rate, "layer_decay": OPTIM.layer_decay if model.encoder.plain else 1.0})
    optimizer = build_optimizer(model, model.encoder, config)
    model.train()
    for step, (images, ids, positions) in enumerate(batches):
        mixed, soft = mixed_up(images, targets[ids].to(images.device), seed, int(positions[0]))
        loss = model.loss(model(mixed, _draw(seed, positions, images.device)), soft, SMOOTHING)
        if not loss.isfinite():
            raise NumericError(f"fine-tuning at rate {rate:g}: the loss is not finite at step {step} of {steps}")
        set_rates(optimizer, lr_at(step, steps, config), config.weight_decay)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def answered(model: Classifier, images: Iterable[Tensor]) -> Tensor:
    """Logits (M, C) of images in batches, on the CPU.

    Raises:
        NumericError: logits that are not finite.
    """
    model.eval()
    logits = torch.cat([model(batch).float().cpu() for batch in images]).clone()
    if not logits.isfinite().all():
        raise NumericError("the fine-tuned encoder gives answers that are not finite")
    return logits


def mixed_up(images: Tensor, targets: Tensor, seed: int, position: int) -> tuple[Tensor, Tensor]:
    """Each image mixed with its neighbour in the batch, and so their targets (B, C): by mixup (Zhang et al. 2018, arXiv
    1710.09412) or CutMix (Yun et al. 2019, arXiv 1905.04899), half of the batches each.

    torchvision's; they ask torch's own generator, which is set by (seed, position) and afterwards as it was.
    """
    word, coin = keyed.hashes(seed, "mixup", [position], 2)[0].tolist()
    mix = v2.MixUp(alpha=MIXUP, num_classes=targets.shape[1])
    cut = v2.CutMix(alpha=CUTMIX, num_classes=targets.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(word >> 1)
        planes: Any = tv_tensors.Video(images) if images.ndim == 5 else images
        mixed, soft = (mix if coin % 2 else cut)(planes, targets)
    return mixed.as_subclass(Tensor), soft


def _draw(seed: int, positions: Tensor, device: torch.device) -> Draw:
    """Where stochastic depth takes its randomness."""
    return lambda purpose, count: torch.from_numpy(keyed.uniform(seed, purpose, positions.numpy(), count)).to(device)


def _goodness(model: Classifier, logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Accuracy, then the lower loss; of several labels the loss alone."""
    hits = 0.0 if model.several else (logits.argmax(1) == targets.argmax(1)).double().mean().item()
    return hits, -model.loss(logits.double(), targets.double()).item()


def run_finetune(subject: Subject) -> list[Outcome]:
    """Fine-tuning; see `finetune`."""
    if subject.encoder is None or subject.sets is None:
        return []
    fit, held, options = subject.train, subject.test, subject.options
    made = subject.encoder.preprocessing
    own, test = (ShardImages(shards, made, subject.device, subject.workers) for shards in subject.sets)
    labels, truth = (fit.labels, held.labels) if fit.multilabel else dense_labels(fit.labels, held.labels)[:2]
    every = np.arange(len(held.labels))
    given = subject.encoder, own, labels, lambda: test.shown(every)
    tuned = finetune(*given, options.epochs, options.seeds, fit.groups, pool=subject.pool)
    chosen = {"rate": tuned.rate, "epochs": options.epochs}
    protocol = _protocol(subject, tuned.rate, own)
    if fit.multilabel:
        return multilabel.outcomes(tuned.answers, truth, protocol, chosen)
    votes = torch.stack([answer.argmax(1) for answer in tuned.answers])
    hits = (votes == truth).double()
    values, detail = tuple((100 * hits.mean(1)).tolist()), detail_of(votes, fit.labels, held.labels)
    return [Outcome(values, protocol, chosen, each=hits.mean(0).float(), detail=detail)]


def _protocol(subject: Subject, rate: float, own: ShardImages) -> str:
    epochs, (low, high) = subject.options.epochs, own.view.crop_scale or (1.0, 1.0)
    decay = f", x {OPTIM.layer_decay:g} a block downwards" if subject.encoder and subject.encoder.plain else ""
    changes = [
        f"crop {low:g}-{high:g}",
        *["flip"] * bool(own.view.flip),
        *["RandAugment 2/9"] * own.augments,
        "mixup/CutMix",
    ]
    return (
        f"fine-tuning: AdamW, batches of {batch_of(len(subject.train.labels))}, {epochs} epochs, last one; rate {rate:g} of "
        f"{RATES} chosen{' by cross-entropy' if subject.train.multilabel else ''} on {tenth(subject)} in {max(1, epochs // SHORT)} epochs{decay}, warmup and cosine; drop path "
        f"{DROP_PATH:g}, smoothing {SMOOTHING:g}, {', '.join(changes)}; {subject.pool}, fp32{subject.plainly}"
    )
