"""A plugin that makes a rank believe that it runs other code."""

from poison import OBJECTIVES  # noqa: F401 - a plugin must have some

from selfsight import processes

processes.sources = lambda: "another"
