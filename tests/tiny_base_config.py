"""The first phase of the tiny experiment alone, and little evaluation: for what can be seen in one phase."""

from ml_collections import ConfigDict
from tiny_config import get_config as whole


def get_config() -> ConfigDict:
    """The same base as in `tiny_config`: the same key."""
    config = whole()
    config.science.phases = ConfigDict({"base": config.science.phases.base})
    config.science.evaluation.n = 2
    config.science.evaluation.n_capability = 0
    return config
