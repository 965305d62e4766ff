"""Probes that pool patch tokens in a learned way, beside the linear probe's fixed pools; every head trained at once.

`attentive`: one learned query looks at the patch tokens, as in the probes of CAE (arXiv 2202.03026, section 4.2), AIM
(arXiv 2401.08541, section 3) and V-JEPA (arXiv 2404.08471). With one query and one attention head the projections of keys and of
values add nothing: q . (K x) is (K^T q) . x, and W (V sum a x) is (W V) sum a x. So a head is a query of the token's width and
softmax regression on what it sees.

`ggem`: group generalised mean pooling (Ko et al. 2022, arXiv 2212.04114, equation 4): (mean over tokens of max(x, 1e-6)^p)^(1/p), with a
learned exponent for each group of channels.

Both start as pools that the linear probe knows: uniform attention is `mean`, exponents of 3 are `gem`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, log

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, evaluating
from selfsight.errors import NumericError, UsageError
from selfsight.eval.features import Extraction, prepared
from selfsight.eval.quality import moments

TOKEN_POOLS = ("attentive", "ggem")
TOKEN_RATES = (0.001, 0.0046, 0.022, 0.1, 0.46, 2.2, 10.0)
TOKEN_HEADS = tuple((rate, 0.0) for rate in TOKEN_RATES)  # each costs a pass over the tokens: fewer than of vectors
TOKEN_GIB = 8.0  # of train's and test's tokens in memory
GROUPS, EXPONENT, SMALLEST, MOMENTUM = 8, 3.0, 1e-6, 0.9
_ROWS, _NUMBERS = 256, 2**26  # samples pooled at once; numbers of a step's tensors that grow with heads

Head = tuple[float, float]  # learning rate, weight decay
Answer = Callable[[Tensor], Tensor]  # features of a pool (n, ...) to logits (n, H, C) of its heads


@dataclass(frozen=True)
class TokenHeads:
    """H probes of one kind: what they learn, and the statistics that they standardise with."""

    kind: str
    shape: Tensor
    """attentive: queries (H, D); ggem: logarithms of exponents (H, G)."""
    weights: Tensor
    """(H, D + 1, C), the bias last."""
    mean: Tensor
    """(D,) of the pool that the kind starts as."""
    std: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, D) to logits (B, H, C)."""
        x = tokens.to(self.weights.device, torch.float32)
        pooled = self._attended((x - self.mean) / self.std) if self.kind == "attentive" else self._grouped(x)
        return torch.einsum("bhd,hdc->bhc", pooled, self.weights[:, :-1]) + self.weights[:, -1]

    def _attended(self, x: Tensor) -> Tensor:
        """(B, H, D): what each query sees of standardised tokens."""
        return (torch.einsum("btd,hd->bht", x, self.shape) / x.shape[-1] ** 0.5).softmax(-1) @ x

    def _grouped(self, x: Tensor) -> Tensor:
        """(B, H, D): generalised means, standardised; by logarithms, which no exponent overflows."""
        exponents = self.shape.exp().repeat_interleave(x.shape[-1] // self.shape.shape[1], dim=1)
        return (generalised_mean(x, exponents) - self.mean) / self.std


def generalised_mean(x: Tensor, exponents: Tensor) -> Tensor:
    """(B, H, D) of tokens (B, T, D) with exponents (H, D)."""
    logs = x.clamp(min=SMALLEST).log()[:, None]  # (B, 1, T, D)
    return (((logs * exponents[:, None]).logsumexp(2) - log(x.shape[1])) / exponents).exp()


def statistics(kind: str, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (D,) over `rows` of the pool that a kind starts as; a constant channel has the deviation 1."""
    plain = torch.full((1, tokens.shape[-1]), EXPONENT)
    pooled = [
        part.mean(1) if kind == "attentive" else generalised_mean(part, plain)[:, 0]
        for part in (tokens[chunk].float() for chunk in rows.split(_ROWS))
    ]
    return moments(torch.cat(pooled))


def start(kind: str, mean: Tensor, std: Tensor, weights: Tensor, heads: int) -> TokenHeads:
    """Every head with weights (D + 1, C), pooling as the kind starts."""
    width, device = len(mean), weights.device
    shape = torch.zeros(heads, width) if kind == "attentive" else torch.full((heads, gcd(width, GROUPS)), log(EXPONENT))
    return TokenHeads(kind, shape.to(device), weights.repeat(heads, 1, 1), mean.to(device), std.to(device))


def fit_tokens(
    kind: str,
    tokens: Tensor,
    rows: Tensor,
    labels: Tensor,
    weights: Tensor,
    heads: Sequence[Head],
    steps: Callable[[], Iterable[tuple[Tensor, float]]],
    frozen: bool = False,
) -> Answer:
    """Train H = len(heads) token probes by SGD with momentum: what they answer on tokens, (n, T, D) to (n, H, C).

    Args:
        kind: of `TOKEN_POOLS`.
        tokens: (N, T, D), of any floating type.
        rows: (n,) which of them to fit on.
        labels: (n,), 0 to C - 1; or (n, C) bool.
        weights: (D + 1, C) that every head starts from, where it is to be trained.
        heads: (learning rate, weight decay) of each.
        steps: gives the batches (of 0 to n - 1) and the factor of the rate, from the first on.
        frozen: leave queries and exponents as they start.
    """
    # A tensor of (B, heads, T, D), of the generalised mean, is what bounds how many are trained at once.
    numbers = min(len(rows), _ROWS) * tokens.shape[1] * (tokens.shape[2] if kind == "ggem" else 1)
    many = max(1, _NUMBERS // numbers)
    parts, (mean, std) = [], statistics(kind, tokens, rows)
    for first in range(0, len(heads), many):
        some = heads[first : first + many]
        probe = start(kind, mean, std, weights, len(some))
        _train(probe, tokens, rows, labels, some, steps(), frozen)
        parts.append(probe)
    return torch.no_grad()(lambda given: torch.cat([probe(given) for probe in parts], dim=1))


def _train(
    probe: TokenHeads,
    tokens: Tensor,
    rows: Tensor,
    labels: Tensor,
    heads: Sequence[Head],
    steps: Iterable[tuple[Tensor, float]],
    frozen: bool,
) -> None:
    """Change a probe's tensors in place. Losses of heads are summed, so each has the gradient that it would have alone."""
    learned = [probe.weights] if frozen else [probe.weights, probe.shape]
    velocity = [torch.zeros_like(values) for values in learned]
    rates, decays = (torch.tensor(column, device=probe.weights.device) for column in zip(*heads, strict=True))
    for batch, scale in steps:
        for values in learned:
            values.requires_grad_()
        loss = _loss(probe(tokens[rows[batch]]), labels[batch].to(probe.weights.device))
        gradients = torch.autograd.grad(loss / len(batch), learned)
        with torch.no_grad():
            for values, speed, gradient in zip(learned, velocity, gradients, strict=True):
                speed.mul_(MOMENTUM).add_(gradient)
                if values is probe.weights:  # neither bias, nor query, nor exponent is decayed
                    speed[:, :-1].addcmul_(decays.view(-1, 1, 1), values[:, :-1])
                values.addcmul_(rates.view(-1, *[1] * (values.ndim - 1)), speed, value=-scale)
    for values in learned:
        values.requires_grad_(False)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over samples and heads; logits (B, H, C), labels (B,) or (B, C) bool."""
    if labels.ndim == 2:
        truth = labels[:, None].expand_as(logits).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]), reduction="sum")


def require_plain(extraction: Extraction) -> None:
    """Raise UsageError unless features are taken plainly."""
    if extraction != Extraction():
        raise UsageError(
            f"{' and '.join(TOKEN_POOLS)} take the plain tokens; leave out scales and token merging, or these pools"
        )


@torch.no_grad()
def tokens_of(
    encoder: Encoder, sets: tuple[Shards, Shards], extraction: Extraction, device: torch.device, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Patch tokens of train and of test, (N, T, D) float16 each, on the CPU.

    Raises:
        UsageError: more than `TOKEN_GIB`, or features that are not taken plainly.
        NumericError: tokens that float16 does not hold.
    """
    require_plain(extraction)
    made, images = [], sum(len(shards) for shards in sets)
    with evaluating(encoder):
        for shards in sets:
            batches = prepared(encoder.preprocessing, shards, device, workers=workers)
            made.append(_tokens(encoder, batches, len(shards), images))
    return made[0], made[1]


def _tokens(encoder: Encoder, batches: Iterator[Tensor], size: int, images: int) -> Tensor:
    kept, done = torch.empty(0), 0
    for batch in batches:
        patches = encoder(batch).patches.half().cpu()
        if not done:
            bounded(images, *patches.shape[1:])
            kept = torch.empty(size, *patches.shape[1:], dtype=torch.half)
        if not patches.isfinite().all():
            raise NumericError("the encoder gives tokens that are not finite in float16")
        kept[done : done + len(patches)] = patches
        done += len(patches)
    return kept


def bounded(images: int, tokens: int, width: int) -> None:
    """Refuse what does not fit in memory."""
    if (size := images * tokens * width * 2 / 2**30) > TOKEN_GIB:
        raise UsageError(
            f"the patch tokens of {images:,} images, {tokens} x {width} in float16, are {size:.1f} GiB; {TOKEN_GIB:g} are kept in "
            f"memory: choose pools other than {' and '.join(TOKEN_POOLS)}, or at most "
            f"{int(images * TOKEN_GIB / size):,} images"
        )
