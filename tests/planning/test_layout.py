"""Where ranks stand, who works with whom, and what a model has nothing of to deal."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.jobs.common import open_checked
from framework.planning.arrange import choose
from framework.planning.layout import AXES, Layout
from framework.planning.make import make_plan
from framework.planning.plan import Plan
from framework.recipe.compose import compose

WAN = ["recipe=diffusion/wan2.2-t2v-a14b-w8a8", "parallel.tp_size=1"]
sizes = st.integers(1, 4)


@given(st.builds(Layout, sizes, sizes, sizes, sizes))
def test_every_place_has_one_rank_and_groups_differ_in_their_axes_alone(layout):
    places = [layout.at(rank) for rank in range(layout.size)]
    assert {tuple(p.values()) for p in places} == set(product(*(range(n) for n in layout.sizes.values())))
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.size))
        for group in groups:
            assert [places[rank][axis] for rank in group] == list(range(layout.sizes[axis]))
            assert len({tuple(places[rank][other] for other in AXES if other != axis) for rank in group}) == 1


def test_tensor_parallel_ranks_are_neighbours():
    assert Layout(tp_size=2, cfg_size=2).groups("tp") == [[0, 1], [2, 3]]
    assert Layout(tp_size=2, cfg_size=2).groups("cfg") == [[0, 2], [1, 3]]
    assert Layout(tp_size=2, data_size=2).groups("tp", "ulysses", "cfg") == [[0, 1], [2, 3]]


def test_a_plan_carries_its_layout_and_bytes_fall_with_tensor_parallelism_alone():
    def weights(*overrides):
        plan = make_plan(open_checked(compose([*WAN, "job=plan", *overrides]), headers_only=True), "npu")
        assert Plan.from_json(plan.to_json()) == plan
        return plan, [rank.weights_bytes for rank in plan.ranks]

    _, (one,) = weights()
    plan, cut = weights("parallel.tp_size=2", "parallel.cfg_size=2", "parallel.ulysses_size=2")
    assert plan.to_json()["layout"] == {"tp_size": 2, "ulysses_size": 2, "cfg_size": 2, "data_size": 1}
    assert plan.to_json()["ranks"][5]["at"] == {"tp": 1, "ulysses": 0, "cfg": 1, "data": 0}
    assert len(set(cut)) == 1 and len(cut) == 8 and one / 2 < cut[0] < 0.55 * one
    assert weights("parallel.cfg_size=2")[1] == [one, one]


@pytest.mark.parametrize(
    ("given", "code", "said", "fix"),
    [
        (["parallel.ulysses_size=3"], "ulysses-heads", "40 attention heads", "ulysses_size=1 or 2 or 4 or 5"),
        (["parallel.tp_size=8", "parallel.ulysses_size=2"], "ulysses-heads", "8 x 2 ranks", "ulysses_size=1 or 5"),
        (["job.guidance=1", "parallel.cfg_size=2"], "cfg-guidance", "one is made", "job.guidance=4"),
        (["job.cache_threshold=0.1", "parallel.cfg_size=2"], "cache-layout", "cfg_size=1", "cache_threshold=null"),
        (["job.cache_threshold=0.1", "parallel.ulysses_size=2"], "cache-layout", "ulysses_size=1", "=null"),
        (["job.cache_threshold=0.1", "runtime.offload=experts"], "cache-layout", "offload=none", "=null"),
    ],
)
def test_axes_that_a_pipeline_cannot_fill_are_refused(given, code, said, fix):
    (problem,) = open_checked(compose([*WAN, *given]), headers_only=True).problems
    assert problem.code == code and said in problem.what and fix in problem.fix


def test_offload_needs_experts_and_a_plan_with_it_holds_the_larger_one():
    (problem,) = open_checked(compose(["recipe=diffusion/digits", "runtime.offload=experts"])).problems
    assert problem.code == "runtime-unused" and problem.fix == "runtime.offload=none"

    def weights(*overrides):
        plan = make_plan(open_checked(compose([*WAN, "job=plan", *overrides]), headers_only=True), "npu")
        assert Plan.from_json(plan.to_json()) == plan
        return plan.ranks[0].weights_bytes

    assert weights("runtime.offload=experts") == weights() / 2  # both experts are alike


def test_guidance_that_is_not_named_is_the_pipelines_own():
    assert open_checked(compose([*WAN, "parallel.cfg_size=2"]), headers_only=True).ok


@pytest.mark.parametrize("axis", ["cfg_size", "ulysses_size", "data_size", "devices"])
def test_a_language_model_has_nothing_for_these_axes(axis):
    given = ["recipe=llm/qwen3-32b-w8a8", "job=check", f"parallel.{axis}=2"]
    (problem,) = open_checked(compose(given), headers_only=True).problems
    assert problem.code == "parallel-unused" and problem.fix.startswith("parallel.")


SIZES = [1, 2, 3, 4, 6, 12]  # that 12 heads allow


@pytest.mark.parametrize(
    ("devices", "given", "off", "sizes", "wanted"),
    [
        (1, Layout(), "", SIZES, Layout()),
        (2, Layout(), "", SIZES, Layout(cfg_size=2)),
        (2, Layout(), "one prediction", SIZES, Layout(ulysses_size=2)),
        (8, Layout(), "", SIZES, Layout(cfg_size=2, ulysses_size=4)),
        (8, Layout(tp_size=2), "", [1, 2, 3, 6], Layout(tp_size=2, cfg_size=2, ulysses_size=2)),
        (10, Layout(), "", SIZES, Layout(cfg_size=2, data_size=5)),
        (8, Layout(data_size=4), "", SIZES, Layout(cfg_size=2, data_size=4)),
        (3, Layout(), "", SIZES, Layout(ulysses_size=3)),
    ],
)
def test_devices_are_dealt_for_the_time_of_one_output(devices, given, off, sizes, wanted):
    choice = choose(devices, given, "they fit", off, sizes)
    assert choice.layout == wanted and choice.layout.size == devices
    used = [f"{axis} {size}" for axis, size in wanted.sizes.items() if size > 1]
    assert all(any(reason.startswith(f"{axis}:") for reason in choice.reasons) for axis in used if "data" not in axis)


def layout_of(*given):
    checked = open_checked(compose([*WAN, *given]), headers_only=True)
    assert checked.ok, checked.problems
    return Layout.of(checked.recipe.parallel), checked.notes


def test_weights_that_do_not_fit_are_cut_first():
    assert layout_of("parallel.devices=8")[0] == Layout(cfg_size=2, ulysses_size=4)
    layout, notes = layout_of("parallel.devices=8", "hardware.hbm_gib=32")
    assert layout == Layout(tp_size=2, cfg_size=2, ulysses_size=2)
    assert notes[0] == "8 devices: cfg 2 x ulysses 2 x tp 2" and "27.2 GiB at tp 1, 14.1 GiB at tp 2" in notes[1]


def test_sizes_that_a_recipe_names_are_kept():
    assert layout_of("parallel.devices=8", "parallel.tp_size=4")[0] == Layout(tp_size=4, cfg_size=2)
    assert layout_of("parallel.devices=4", "job.guidance=1")[0] == Layout(ulysses_size=4)
    (problem,) = open_checked(compose([*WAN, "parallel.devices=8", "parallel.tp_size=3"]), headers_only=True).problems
    assert problem.code == "devices-uneven" and "parallel.devices=9" in problem.fix
