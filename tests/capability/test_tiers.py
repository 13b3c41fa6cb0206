"""Chips and their tiers, typed from torch_npu 2.13's enumeration."""

import pytest

from framework.capability.tiers import require_tier, tier_of
from framework.errors import Refused

CHIPS = [
    (220, "Ascend910B1", "a2"), (221, "Ascend910B2", "a2"), (222, "Ascend910B2C", "a2"), (223, "Ascend910B3", "a2"),
    (224, "Ascend910B4", "a2"), (225, "Ascend910B4-1", "a2"), (250, "Ascend910_9391", "a3"),
    (255, "Ascend910_9362", "a3"), (256, "Ascend910_9363", "a3"), (260, "Ascend950PR_9579", "a5"),
    # numbers of versions to come: by name
    (999, "Ascend910B3", "a2"), (999, "Ascend910_9382", "a3"), (999, "Ascend950DT_9574", "a5"),
    (999, "Ascend910_9599", "a5"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "name", "tier"), CHIPS)
def test_a_chip_is_of_its_tier(number, name, tier):
    assert tier_of(number, name) == tier
    require_tier(tier, number, name)


# test_g58: SoC 256 is an A3
def test_g58_the_last_a3_number_is_an_a3():
    assert tier_of(256, "") == "a3"


@pytest.mark.parametrize(("number", "name"), [(104, "Ascend910B"), (200, "Ascend310P3"), (-1, "")])
def test_a_chip_of_no_tier_is_refused_with_both_values(number, name):
    with pytest.raises(Refused) as refused:
        tier_of(number, name)
    (problem,) = refused.value.problems
    assert problem.code == "tier-unknown" and str(number) in problem.what and name in problem.what


def test_another_tier_than_the_recipe_s_is_refused_with_the_one_to_ask_for():
    with pytest.raises(Refused) as refused:
        require_tier("a2", 255, "Ascend910_9362")
    (problem,) = refused.value.problems
    assert (problem.code, problem.fix) == ("tier-mismatch", "hardware=a3")
