"""The floor that looks at no image: what an answer is worth that is the same for every sample."""

from selfsight.eval.bags import bags_of
from selfsight.eval.features import Features
from selfsight.eval.subject import Outcome


def of_samples(train: Features, test: Features) -> list[Outcome]:
    """The commonest class of train; of lists of labels the same answer for every image, by which nothing is ranked."""
    if test.multilabel:
        shares = test.labels.double().mean(0)
        shares = shares[(shares > 0) & (shares < 1)]
        told = "the same answer for every image: mAP is the classes' prevalence, AUC is 50"
        values = {"mAP": 100 * shares.mean().item(), "AUC": 50.0} if len(shares) else {}
        return [Outcome((value,), told, metric=metric) for metric, value in values.items()]
    common = train.labels.mode().values
    each = (test.labels == common).double()
    return [Outcome((100 * each.mean().item(),), f"the commonest class of train, {int(common)}", each=each)]


def of_bags(train: Features, test: Features) -> list[Outcome]:
    """As `of_samples`, each bag counted once; the AUC of one answer for all is 50."""
    fit, held = (bags_of(own.labels, own.groups) for own in (train, test))
    (made,) = of_samples(Features({}, fit.labels, fit.groups), Features({}, held.labels, held.groups))
    made = made._replace(protocol=f"{made.protocol}, by bags", each=None)
    ranked = Outcome((50.0,), "the same answer for every bag: AUC is 50", metric="AUC")
    return [made, made._replace(metric="accuracy, means"), ranked, ranked._replace(metric="AUC, means")]
