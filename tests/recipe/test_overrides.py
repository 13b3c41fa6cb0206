"""Each row of what people type: what is taken, what is refused, and that the corrected command works."""

import shlex

import pytest

from framework.errors import InputError
from framework.recipe.compose import compose
from framework.recipe.overrides import prepare


def problems_of(*overrides, multirun=False):
    with pytest.raises(InputError) as error:
        prepare(["recipe=quickstart", *overrides], multirun=multirun)
    assert error.value.exit_status == 2
    return error.value.problems


def corrected(*overrides):
    """The overrides of the command that the message proposes."""
    fix = problems_of(*overrides)[-1].fix.removesuffix("   or add -m")
    words = shlex.split(fix)
    assert words[:2] == ["python", "launch.py"]
    return words[2:]


@pytest.mark.parametrize(
    "text",
    [
        "a|b",
        "*",
        "W4A16*",
        "a%b",
        "a@b",
        "a?b",
        "a+b",
        "a:b",
        "./a b.txt",
        "hf://Qwen/X-W8A8",
        "modelscope://a/b@main",
    ],
)
def test_text_without_grammar_signs_is_taken_as_typed(text):
    recipe = compose(["recipe=quickstart", "job=verify", f"job.logits_key={text}"])
    assert recipe.job.options["logits_key"] == text


@pytest.mark.parametrize(
    "text",
    ["李明", "a#b", "a!b", "a&b", "~/x", "(a)", "re:^model", "re:.*(gate|up)_proj", "a=b", "pypi://pkg==1.2/f.gguf",
     'say "hi", she=said', "back\\slash=1"],
)  # fmt: skip
def test_text_that_hydra_cannot_read_is_refused_with_a_command_that_works(text):
    typed = ["job=verify", f"job.logits_key={text}"]
    assert problems_of(*typed)[0].code == "override-syntax"
    recipe = compose(corrected(*typed))
    assert recipe.job.options["logits_key"] == text


@pytest.mark.parametrize("text", ['"李明"', "'a=b'", "'/models/a,b.gguf'"])
def test_quoted_text_is_taken(text):
    recipe = compose(["recipe=quickstart", "job=verify", f"job.logits_key={text}"])
    assert recipe.job.options["logits_key"] == text[1:-1]


def test_a_comma_is_a_sweep_or_a_text_and_the_message_says_both():
    assert corrected("job.prompts=hello, world") == ["recipe=quickstart", 'job.prompts=["hello, world"]']
    assert corrected("job=bench", "job.batch_sizes=1,2,3")[-1] == "job.batch_sizes=[1,2,3]"
    assert corrected("parallel.tp_size=1,2")[-1] == "parallel.tp_size=1"
    assert "-m" in problems_of("parallel.tp_size=1,2")[0].fix
    assert prepare(["recipe=quickstart", "parallel.tp_size=1,2"], multirun=True)[-1] == "parallel.tp_size=1,2"


def test_prompts_with_signs_are_proposed_as_a_quoted_list():
    typed = "job.prompts=[What's 2+2=, you #1 (really)?]"
    (prompt,) = compose(corrected(typed)).job.options["prompts"]
    assert prompt == "What's 2+2=, you #1 (really)?"


def test_all_unknown_keys_are_one_message_with_one_corrected_command():
    (problem,) = problems_of("paralel.tp_size=4", "runtime.sead=1")
    assert problem.code == "unknown-key"
    assert problem.what == "2 keys are not in the recipe schema"
    assert "did you mean parallel.tp_size?" in problem.why
    assert "did you mean runtime.seed?" in problem.why
    assert problem.fix == "python launch.py recipe=quickstart parallel.tp_size=4 runtime.seed=1"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.pth=2", "model.path"),
        ("+model.pth=2", "model.path"),
        ("++model.pth=2", "model.path"),
        ("tp_size=2", "parallel.tp_size"),
        ("max_new_tokens=2", "job.max_new_tokens"),
        ("job.max_tokens=2", "job.max_new_tokens"),
        ("runtime.tp_size=2", "parallel.tp_size"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_also_after_plus_signs(typed, meant):
    assert f"did you mean {meant}?" in problems_of(typed)[0].why


def test_a_key_like_nothing_gets_the_known_ones():
    assert "known keys: hardware, cluster, job" in problems_of("++zzz=1")[0].why
    assert "option of job bench" in problems_of("job.batch_sizes=[1]")[0].why


def test_plus_signs_before_a_known_key_change_nothing():
    for sign in ("", "+", "++"):
        assert compose(["recipe=quickstart", f"{sign}parallel.tp_size=3"]).parallel.tp_size == 3


@pytest.mark.parametrize("typed", ["~model.path", "~job", "~recipe=quickstart"])
def test_keys_cannot_be_deleted(typed):
    assert problems_of(typed)[0].code == "override-delete"


@pytest.mark.parametrize(
    ("typed", "code"),
    [
        ("parallel.tp_size=abc", "wrong-type"),
        ("parallel.tp_size=12.0", "wrong-type"),
        ("parallel.tp_size=1e3", "wrong-type"),
        ("parallel.tp_size=true", "wrong-type"),
        ("parallel.tp_size=", "wrong-type"),
        ("parallel.tp_size=0", "wrong-type"),
        ("parallel.tp_size=null", "wrong-type"),
        ("model.path=null", "wrong-type"),
        ("model.path=true", "yaml-type"),
        ("runtime.dtype=bf16", "unknown-value"),
        ("runtime.memory_fraction=1.5", "wrong-type"),
        ("runtime.memory_fraction=0", "wrong-type"),
        ("parallel=3", "wrong-type"),
        ("quantization.layers=[{pattern: a}]", "missing-key"),
        ("quantization.layers=[{pattern: a, scheme: flaot}]", "unknown-value"),
        ("capability.allow=[maybe]", "unknown-value"),
        ("hardware=a4", "unknown-value"),
        ("hardware={name: a3}", "unknown-value"),
        ("job=chek", "unknown-value"),
        ("job=sing", "unknown-value"),
        ("quantization.layers.0.scheme=float", "unknown-key"),
        ("quantization.layers[0].scheme=float", "override-syntax"),
        ("quantization.layers={'a.*.b':x}", "override-syntax"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(typed, code):
    assert code in [p.code for p in problems_of(typed)]


@pytest.mark.parametrize(
    ("typed", "value"), [("12", 12), ("'12'", 12), ("1_000", 1000)],
)  # fmt: skip
def test_whole_numbers_may_be_quoted_or_grouped(typed, value):
    assert compose(["recipe=quickstart", f"runtime.max_batch={typed}"]).runtime.max_batch == value


@pytest.mark.parametrize(
    ("typed", "tokens"), [("32k", 32768), ("4K", 4096), ("1m", 1048576), ("512", 512), ("auto", "auto")]
)
def test_a_context_may_be_given_in_thousands(typed, tokens):
    assert compose(["recipe=quickstart", f"runtime.context={typed}"]).runtime.context == tokens


def test_keys_and_types_are_reported_together():
    problems = problems_of("paralel.tp_size=4", "runtime.dtype=bfloat", "model.path=true")
    assert [p.code for p in problems] == ["unknown-key", "wrong-type"]
    assert problems[-1].fix == (
        "python launch.py recipe=quickstart parallel.tp_size=4 runtime.dtype=bfloat16 'model.path=\"true\"'"
    )


def test_the_name_of_a_group_is_chosen_by_the_group():
    (problem,) = problems_of("hardware.name=a3")
    assert problem.fix == "python launch.py recipe=quickstart hardware=a3"


def test_ordered_rules_can_be_given_whole_on_the_command_line():
    rules = "{pattern: '*.down_proj', scheme: float}, {pattern: 're:^a[0-3]$', scheme: auto}"
    layers = compose(["recipe=quickstart", f"quantization.layers=[{rules}]"]).quantization.layers
    assert [rule.pattern for rule in layers] == ["*.down_proj", "re:^a[0-3]$"]


def test_a_recipe_that_is_not_there_lists_the_nearest():
    with pytest.raises(InputError) as error:
        prepare(["recipe=llm/locl"])
    (problem,) = error.value.problems
    assert problem.code == "recipe-not-found"
    assert "recipe=llm/local" in problem.fix
    assert "quickstart" in problem.why


def test_a_word_without_equals_sign_is_taken_for_a_recipe_that_was_meant():
    with pytest.raises(InputError) as error:
        prepare(["quickstart"])
    assert error.value.problems[0].fix == "did you mean recipe=quickstart?"


def test_an_option_of_another_job_proposes_that_job():
    assert corrected("job.labels=[3]", "job=generate") == ["recipe=quickstart", "job.labels=[3]", "job=render"]
    (problem,) = problems_of("job.labels=[3]")
    assert problem.fix == "write job=render" and "option of job render" in problem.why


def test_a_list_that_the_shell_has_split_is_one_problem():
    (problem,) = problems_of("job.prompts=[Why", "is", "the", "sky", "blue?]", "runtime.seed=1")
    assert problem.code == "override-syntax" and "split" in problem.what
    assert compose(["recipe=quickstart", *shlex.split(problem.fix)]).job.options["prompts"] == ["Why is the sky blue?"]


@pytest.mark.parametrize(
    ("typed", "right"), [("capability.allow=tbd", ["tbd"]), ("capability.allow=[unsupported]", None)]
)
def test_one_value_for_a_list_is_offered_as_a_list(typed, right):
    problem = problems_of(typed)[-1]
    if right is None:
        assert problem.fix == "capability.allow=..." and "wip | tbd" in problem.why
    else:
        assert list(compose(corrected(typed)).capability.allow) == right


def test_a_section_is_not_offered_for_a_key():
    assert "parallel=" not in problems_of("paralel.x=3")[0].fix
