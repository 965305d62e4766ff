"""kNN and the linear probe as evaluators of `evaluate`: their outcomes with the protocol line to cite."""

from selfsight.eval.knn import TEMPERATURE, dense_labels, knn
from selfsight.eval.linear import DECAYS, RATES, linear
from selfsight.eval.subject import Outcome, Subject


def tenth(subject: Subject) -> str:
    """What every choice was made on, in words."""
    return f"a held-out tenth of train{' of whole groups' if (subject.train.groups >= 0).any() else ''}"


def run_knn(subject: Subject) -> list[Outcome]:
    """Weighted kNN vote; see `knn`."""
    fit, held = subject.train, subject.test
    near = knn(subject.fit, fit.labels, subject.held, held.labels, subject.options.k, fit.groups)
    protocol = (
        f"kNN: cosine, weights exp(s/{TEMPERATURE}), k={near.k} chosen from {near.candidates} on {tenth(subject)}; "
        f"features: {subject.pool}, fp32"
    )
    each = (near.predicted == dense_labels(fit.labels, held.labels)[1]).float()
    return [Outcome((near.accuracy,), protocol, {"k": near.k, "pool": subject.pool}, each=each)]


def run_linear(subject: Subject) -> list[Outcome]:
    """Linear probe; see `linear`."""
    fit, held = subject.train, subject.test
    probe = linear(fit.vectors, fit.labels, held.vectors, held.labels, subject.options.seeds, fit.groups)
    protocol = (
        f"linear: {len(RATES)} rates x {len(DECAYS)} decays x {len(fit.vectors)} pools; rate {probe.rate:g}, decay "
        f"{probe.decay:g}, {probe.pool} chosen on {tenth(subject)}, refitted on all of it; standardised features, fp32"
    )
    return [Outcome(probe.accuracies, protocol, {"rate": probe.rate, "decay": probe.decay, "pool": probe.pool})]
