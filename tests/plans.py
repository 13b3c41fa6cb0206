"""Plans for tests: a checkpoint, a size, a dtype, as the command line would make them."""

from framework.checkpoint.open import open_index
from framework.jobs.common import read_capability
from framework.planning.check import check
from framework.planning.make import make_plan
from framework.recipe.compose import compose


def checked_for(path, *overrides):
    recipe = compose(["recipe=llm/local", f'model.path="{path}"', "job=verify", *overrides])
    return check(recipe, {"": open_index(path)}, read_capability(recipe))


def plan_for(path, *overrides, tp_size=1, dtype="bfloat16", context=256, max_batch=4):
    given = [f"parallel.tp_size={tp_size}", f"runtime.dtype={dtype}", f"runtime.context={context}"]
    return make_plan(checked_for(path, *given, f"runtime.max_batch={max_batch}", *overrides), "cpu")
