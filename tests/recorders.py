"""The scripts that record fixtures, as modules: tests use their configurations and compare with the same functions."""

import importlib.util
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"


def load_recorder(name):
    """`record_families` or `record_heads`."""
    module_spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
