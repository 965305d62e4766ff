"""What an encoder learned: features extracted once, scored beside floors."""

from collections.abc import Sequence

from selfsight.errors import UsageError

# The names in `evaluators.EVALUATORS`, here so that a misspelt one is told before torch is imported.
NAMES = (
    "knn", "linear", "logistic", "fewshot", "lda", "finetune", "retrieval", "cluster", "dense", "bags", "robust", "health",
)  # fmt: skip
DEFAULT = ("knn", "linear", "health")


def require_known(names: Sequence[str]) -> None:
    """Raise UsageError for names of no evaluator, or none at all."""
    if unknown := sorted(set(names) - set(NAMES)):
        raise UsageError(f"no evaluator {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if not names:
        raise UsageError(f"no evaluator asked for; there are {', '.join(NAMES)}")
