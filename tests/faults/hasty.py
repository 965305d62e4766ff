"""A plugin that gives remote shards a second before they count as gone."""

from poison import OBJECTIVES  # noqa: F401 - a plugin must have some

from selfsight.data.shards import Shards

Shards.patience = 1.0
