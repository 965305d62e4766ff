"""An alarm for a loss that leaves its own past: a rate that is too high, a wrong scale, a batch of another kind of data."""

from math import isfinite, sqrt

from selfsight import console
from selfsight.past import Past

DECAY = 0.95  # of the running mean and variance, a look; looks are as those of the collapse watch
LIMIT = 6.0  # standard deviations above the mean
FLOOR = 0.05  # least standard deviation, as a share of the mean: a smooth curve is no reason for an alarm
WARM = 5  # looks before the first alarm
PATIENCE = 3  # looks in a row


class DivergenceWatch:
    """Says once when the loss has been far above its running mean for some looks.

    Args:
        past: what it remembers.
    """

    def __init__(self, past: Past) -> None:
        self.past = past

    def __call__(self, step: int, loss: float, quiet: bool) -> None:
        """Look at the loss after `step` steps."""
        past = self.past
        if not isfinite(loss):
            return
        spread = max(sqrt(max(0.0, past.square - past.mean**2)), FLOOR * abs(past.mean))
        if past.looks >= WARM and loss - past.mean > LIMIT * spread:
            past.high += 1
            if past.high >= PATIENCE and "divergence" not in past.told:
                past.told.append("divergence")
                if not quiet:
                    console.say(
                        f"warning: step {step}: the loss is {loss:.4g}, far above the {past.mean:.4g} that it was "
                        f"({(loss - past.mean) / spread:.0f} standard deviations); a lower optim.lr or optim.clip 1.0 usually helps"
                    )
            return  # the past that it is compared with stays as it was
        past.high = 0
        past.looks += 1
        weight = max(1 - DECAY, 1 / past.looks)
        past.mean += weight * (loss - past.mean)
        past.square += weight * (loss**2 - past.square)
