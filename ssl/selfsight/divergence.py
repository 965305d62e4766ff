"""An alarm for a loss that runs away: a rate that is too high, a wrong scale, data of another kind."""

from math import isfinite, sqrt

from selfsight import console
from selfsight.collapse import EVERY
from selfsight.past import Past

UNTRAINED = 2.0  # times the loss of the first step: no healthy run of the recipes ever came near it (docs/log.md)
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
        """Look at the loss after `step` steps; the first look is at that of untrained weights.

        The first steps are looked at one by one, and only compared with untrained weights: what a rate does that is far too
        high may be over by the next regular look.
        """
        past = self.past
        if not isfinite(loss):
            return
        past.first = past.first if past.looks else loss
        if loss > UNTRAINED * past.first > 0:
            self._tell(step, f"{loss:.4g}, above the {past.first:.4g} of untrained weights", quiet)
        if 1 < step < EVERY:
            return
        spread = max(sqrt(max(0.0, past.square - past.mean**2)), FLOOR * abs(past.mean))
        above = past.looks >= WARM and loss - past.mean > LIMIT * spread
        past.high = past.high + 1 if above else 0
        if past.high >= PATIENCE:
            self._tell(step, f"{loss:.4g}, far above the {past.mean:.4g} that it was", quiet)
        if above:
            return  # the past that it is compared with stays as it was
        past.looks += 1
        weight = max(1 - DECAY, 1 / past.looks)
        past.mean += weight * (loss - past.mean)
        past.square += weight * (loss**2 - past.square)

    def _tell(self, step: int, what: str, quiet: bool) -> None:
        if "divergence" in self.past.told:
            return
        self.past.told.append("divergence")
        if not quiet:
            console.say(
                f"warning: step {step}: the loss is {what}; a lower optim.lr, longer optim.warmup or optim.clip 1.0 usually helps"
            )
