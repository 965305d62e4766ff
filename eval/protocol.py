"""kNN and the linear probe as evaluators of `evaluate`: their outcomes with the protocol line to cite."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from selfsight.errors import UsageError
from selfsight.eval import multilabel
from selfsight.eval.knn import TEMPERATURE, knn, knn_ranked
from selfsight.eval.labels import dense_labels
from selfsight.eval.linear import DECAYS, RATES, linear
from selfsight.eval.quality import confusion
from selfsight.eval.subject import Outcome, Subject
from selfsight.eval.token_probe import TOKEN_POOLS, TOKEN_RATES, tokens_of

MOST_CLASSES = 100  # of a confusion matrix that is kept


def tenth(subject: Subject) -> str:
    """What every choice was made on, in words."""
    return f"a held-out tenth of train{' of whole groups' if (subject.train.groups >= 0).any() else ''}"


def detail_of(predicted: Tensor, train_labels: Tensor, test_labels: Tensor) -> dict[str, Any]:
    """The confusion matrix, rows truth, counts that are means over seeds, and the labels it is in the order of.

    Args:
        predicted: (seeds, M), 0 to C - 1 in the order of train's classes.
        train_labels, test_labels: as they are in the sets.
    """
    _, truth, classes = dense_labels(train_labels, test_labels)
    if classes > MOST_CLASSES:
        return {}
    counts = confusion(predicted, truth.expand_as(predicted), classes)
    return {
        "confusion": (counts / len(predicted)).double().mul(100).round().div(100).tolist(),
        "classes": train_labels.unique().tolist(),
    }


def run_knn(subject: Subject) -> list[Outcome]:
    """Weighted kNN vote; see `knn` and `knn_ranked`."""
    fit, held, k = subject.train, subject.test, subject.options.k
    told = (
        f"kNN: cosine, weights exp(s/{TEMPERATURE}), k={{}} chosen from {{}}{{}} on {tenth(subject)}; "
        f"features: {subject.taken}"
    )
    if fit.multilabel:
        near = knn_ranked(subject.fit, fit.labels, subject.held, k, fit.groups)
        protocol = told.format(near.k, near.candidates, " by mAP") + "; ranked by the share of the vote"
        return multilabel.outcomes([near.scores], held.labels, protocol, {"k": near.k, "pool": subject.pool})
    one = knn(subject.fit, fit.labels, subject.held, held.labels, k, fit.groups)
    each = (one.predicted == dense_labels(fit.labels, held.labels)[1]).float()
    detail = detail_of(one.predicted[None], fit.labels, held.labels)
    chosen = {"k": one.k, "pool": subject.pool}
    return [Outcome((one.accuracy,), told.format(one.k, one.candidates, ""), chosen, each=each, detail=detail)]


def run_linear(subject: Subject) -> list[Outcome]:
    """Linear probe, and probes of tokens where `options.pools` asks for them; see `linear` and `token_probe`."""
    fit, held = subject.train, subject.test
    train, test = _pools(subject)
    probe = linear(train, fit.labels, test, held.labels, subject.options.seeds, fit.groups, subject.device)
    vectors = [pool for pool in train if pool not in TOKEN_POOLS]
    tried = [f"{len(RATES)} rates x {len(DECAYS)} decays x {len(vectors)} pools"] if vectors else []
    tried += [f"{len(TOKEN_RATES)} rates of {pool}" for pool in train if pool in TOKEN_POOLS]
    protocol = (
        f"linear: {', '.join(tried)}; rate {probe.rate:g}, decay {probe.decay:g}, {probe.pool} chosen"
        f"{' by mAP' if fit.multilabel else ''} on {tenth(subject)}, refitted on all of it; "
        f"standardised features: {replace(subject, pool=probe.pool).taken}"
    )
    chosen = {"rate": probe.rate, "decay": probe.decay, "pool": probe.pool}
    if fit.multilabel:
        return multilabel.outcomes(
            list(probe.logits), held.labels, f"{protocol}; a logistic regression a class", chosen
        )
    predicted = probe.logits.argmax(2)
    each = (predicted == dense_labels(fit.labels, held.labels)[1]).float().mean(0)
    detail = detail_of(predicted, fit.labels, held.labels)
    return [Outcome(probe.accuracies, protocol, chosen, each=each, detail=detail)]


def _pools(subject: Subject) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By pool what the probe chooses from: vectors (N, D), and tokens (N, T, D) for every token pool asked for."""
    wanted = subject.options.pools or ()
    asked = [pool for pool in wanted if pool in TOKEN_POOLS and subject.encoder is not None]
    # Raw pixels and stored vectors have pools of their own.
    names = [pool for pool in subject.train.vectors if pool in wanted] or ([] if asked else list(subject.train.vectors))
    train, test = ({pool: side.vectors[pool] for pool in names} for side in (subject.train, subject.test))
    if not asked or subject.encoder is None:
        return train, test
    if subject.sets is None:
        raise UsageError(f"{', '.join(asked)}: pools of tokens need images; stored vectors have none")
    subject.say(f"keeping the tokens of train and test for {', '.join(asked)}")
    tokens = tokens_of(subject.encoder, subject.sets, subject.options.extraction, subject.device, subject.workers)
    return train | dict.fromkeys(asked, tokens[0]), test | dict.fromkeys(asked, tokens[1])
