"""Which tier a chip is of, by what torch_npu says of it (SoC number and device name)."""

from __future__ import annotations

import re

from framework.errors import Problem, Refused

# torch_npu.npu.get_soc_version(): NpuVariables.h of torch_npu 2.13. 104 is *named* Ascend910B there, and is no A2.
SOC_NUMBERS = {"a2": range(220, 226), "a3": range(250, 257), "a5": range(260, 261)}
# torch_npu.npu.get_device_name(), for numbers that newer versions add
SOC_NAMES = {"a2": r"Ascend910B[1-4]", "a3": r"Ascend910_93", "a5": r"Ascend(950|910_95)"}


def tier_of(number: int, name: str) -> str:
    """Return a2, a3 or a5.

    Raises:
        Refused: `tier-unknown`, with both values.
    """
    for tier, numbers in SOC_NUMBERS.items():
        if number in numbers:
            return tier
    for tier, pattern in SOC_NAMES.items():
        if re.match(pattern, name):
            return tier
    raise Refused(
        Problem(
            "tier-unknown",
            f"this chip is of no tier that is known: SoC {number}, named {name}",
            "torch_npu.npu.get_soc_version()",
            f"known: {', '.join(f'{tier} {r.start}..{r.stop - 1}' for tier, r in SOC_NUMBERS.items())}",
            "run on Atlas A2, A3 or Ascend 950   or   runtime.device=cpu",
        )
    )


def require_tier(asked: str, number: int, name: str) -> None:
    """Compare the tier that a plan was made for with the chip that is here.

    Raises:
        Refused: `tier-mismatch`, `tier-unknown`.
    """
    found = tier_of(number, name)
    if found != asked:
        raise Refused(
            Problem(
                "tier-mismatch",
                f"the recipe was checked and planned for {asked}, this device is {found}",
                f"SoC {number}, named {name}",
                "the support table, the ops' limits and the memory of another tier are other ones",
                f"hardware={found}",
            )
        )
