"""Every row, tier and policy of both support tables, against the tables typed by hand in support.py."""

import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.capability.judge import Policy, Question, judge
from framework.capability.table import Table
from tests.capability.support import DEFAULT, MX, POLICIES, PUBLISHED, TABLES, TIERS, for_llm, table, typed

LLM = [(name, row, tier, allow) for name in TABLES for row in for_llm(name) for tier in TIERS for allow in POLICIES]
LLM_ONLY = ("awq", "gptq", "auto_round", "compressed_tensors", "gguf")
WHERE = "recipe.yaml:7  quantization.layers[0]"


def asked_of(given_row, kind="llm"):
    format_name, scheme, layer, _, mode = given_row
    return Question(format_name, scheme, layer, kind, mode)


def text_of(problem):
    return "\n".join((problem.what, problem.why, problem.fix))


def code_of(verdict):
    return verdict.problem.code if verdict.problem else None


def expected_code(status, allow):
    return None if status == "supported" or status in allow else f"row-{status}"


@pytest.mark.parametrize("name", TABLES)
def test_the_file_has_these_rows_and_no_others(name):
    rows = table(name).rows
    assert sorted(rows) == sorted(TABLES[name])
    for row, (format_name, scheme, layer, statuses, mode) in TABLES[name].items():
        found = rows[row]
        assert (found.format, found.scheme, found.layer_type, found.mode) == (format_name, scheme, layer, mode), row
        assert {key: getattr(found, key) for key in statuses} == statuses, row


def test_the_published_rows_are_31_and_ours_are_never_better_than_tbd():
    published = typed(PUBLISHED)
    assert len(published) == 31
    for row, found in table().rows.items():
        assert found.origin == ("table" if row in published else "ours"), row
        assert found.source and found.key, row
        if found.origin == "ours" and found.scheme != "float":
            assert {found.a2, found.a3, found.a5} <= {"tbd", "unsupported"}, row


@pytest.mark.parametrize(("name", "row", "tier", "allow"), LLM)
def test_a_language_model_is_judged_by_its_row(name, row, tier, allow):
    statuses = for_llm(name)[row][3]
    asked = asked_of(for_llm(name)[row])
    verdict = judge(table(name), asked, Policy(tier, allow), modules=7, where=WHERE)
    status = statuses[tier]
    assert (verdict.row, verdict.status, code_of(verdict)) == (row, status, expected_code(status, allow))
    if verdict.problem is None:
        return
    text = text_of(verdict.problem)
    assert row in verdict.problem.why and name in verdict.problem.why
    assert tier in verdict.problem.what and "7 modules" in verdict.problem.what
    assert verdict.problem.where == WHERE
    running = {one for one in TIERS if statuses[one] == "supported"}
    assert set(re.findall(r"hardware=(a\d)", verdict.problem.fix)) == running
    override = re.search(r"capability\.allow=\[([^\]]*)\]", text)
    assert (override is not None) == (status in ("tbd", "wip"))
    if override is not None:
        allowed = tuple(override[1].split(","))
        assert judge(table(name), asked, Policy(tier, allowed)).problem is None


# format, scheme, layer type, mode -> the judging row, its status on a2, a3, a5
DIFFUSION = [
    ("none", "mxfp8", "linear", "online", "diffusion.mxfp8.online", "unsupported unsupported supported"),
    ("modelslim", "mxfp8", "linear", "offline", "diffusion.mxfp8.offline", "unsupported unsupported supported"),
    ("modelslim", "w8a8_static", "linear", "offline", "diffusion.w8a8_static.offline", "supported supported tbd"),
    ("modelslim", "w8a8_dynamic", "linear", "offline", "diffusion.w8a8_dynamic.offline", "supported supported tbd"),
    ("modelslim", "w4a4_dynamic", "linear", "offline", "diffusion.w4a4_dynamic.offline", "supported supported tbd"),
    ("modelslim", "mxfp4", "linear", "offline", "modelslim.mxfp4.linear", "unsupported unsupported supported"),
    ("modelslim", "mxfp4_dualscale", "linear", "offline", "modelslim.mxfp4.linear",
     "unsupported unsupported supported"),
    ("none", "float", "linear", "offline", "none.float.linear", "supported supported supported"),
    ("modelslim", "float", "linear", "offline", "none.float.linear", "supported supported supported"),
    ("none", "float", "moe", "offline", "none.float.moe", "unsupported unsupported unsupported"),
    ("none", "w8a8_dynamic", "linear", "online", "online.w8a8_dynamic.linear", "tbd tbd tbd"),
    ("none", "mxfp8", "moe", "online", "online.mxfp8.moe", "unsupported unsupported unsupported"),
    *(
        ("modelslim", scheme, layer, "offline", f"modelslim.{scheme}.{layer}", "unsupported unsupported unsupported")
        for scheme, layer in (
            ("w4a4_dynamic", "moe"), ("w4a8_dynamic", "moe"), ("w8a8_dynamic", "moe"), ("mxfp8", "moe"),
            ("mxfp4", "moe"), ("w4a8_mxfp", "moe"), ("w4a16", "moe"), ("w8a16", "moe"),
            ("w4a8_dynamic", "linear"), ("w8a8_mix", "linear"), ("w4a8_mxfp", "linear"), ("w4a16", "linear"),
            ("w8a16", "linear"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("allow", POLICIES)
@pytest.mark.parametrize(("format_name", "scheme", "layer", "mode", "row", "statuses"), DIFFUSION)
def test_a_diffusion_model_is_judged_by_its_own_rows_first(format_name, scheme, layer, mode, row, statuses, allow):
    for tier, status in zip(TIERS, statuses.split(), strict=True):
        asked = Question(format_name, scheme, layer, "diffusion", mode)
        verdict = judge(table(), asked, Policy(tier, allow), modules=3, where=WHERE)
        assert (verdict.row, verdict.status, code_of(verdict)) == (row, status, expected_code(status, allow))
        if verdict.problem:
            assert "diffusion" in verdict.problem.what and "3 modules" in verdict.problem.what
            assert row in verdict.problem.why


@pytest.mark.parametrize("row", [row for row in DEFAULT if row.startswith(LLM_ONLY)])
def test_formats_of_language_models_are_refused_for_diffusion(row):
    for tier, allow in product(TIERS, POLICIES):
        asked = asked_of(DEFAULT[row], "diffusion")
        verdict = judge(table(), asked, Policy(tier, allow), modules=3, where=WHERE)
        assert (verdict.row, verdict.status, code_of(verdict)) == ("", "unsupported", "row-unknown")
        text = text_of(verdict.problem)
        assert row in text and "language models only" in text and "3 linear" in text.replace("moe", "linear")


@pytest.mark.parametrize("format_name", ["none", "modelslim", *LLM_ONLY])
@pytest.mark.parametrize("layer", ["linear", "moe"])
def test_a_float_module_is_judged_as_float_whatever_the_file_but_in_gguf(format_name, layer):
    for tier in TIERS:
        verdict = judge(table(), Question(format_name, "float", layer), Policy(tier, ("tbd",)))
        assert verdict.row == (f"gguf.all.{layer}" if format_name == "gguf" else f"none.float.{layer}")
        assert verdict.problem is None


@pytest.mark.parametrize(
    ("name", "scheme", "kind", "row", "status"),
    [
        ("default", "mxfp4", "llm", "modelslim.mxfp4.linear", "supported"),
        ("default", "mxfp4", "diffusion", "modelslim.mxfp4.linear", "supported"),
        ("default", "mxfp4_dualscale", "llm", "modelslim.mxfp4_dualscale.linear", "tbd"),
        ("default", "mxfp4_dualscale", "diffusion", "modelslim.mxfp4.linear", "supported"),
        ("upstream-0.5.23", "mxfp4", "llm", "modelslim.mxfp4_w4a4.linear", "wip"),
        ("upstream-0.5.23", "mxfp4", "diffusion", "modelslim.mxfp4.linear", "supported"),
        ("upstream-0.5.23", "mxfp4_dualscale", "llm", "modelslim.mxfp4_dualscale.linear", "tbd"),
        ("upstream-0.5.23", "mxfp4_dualscale", "diffusion", "modelslim.mxfp4.linear", "supported"),
    ],
)
def test_who_judges_mxfp4_linears(name, scheme, kind, row, status):
    verdict = judge(table(name), Question("modelslim", scheme, "linear", kind), Policy("a5"))
    assert (verdict.row, verdict.status) == (row, status)


@pytest.mark.parametrize(
    ("scheme", "row", "status"),
    [
        ("mxfp8", "diffusion.mxfp8.online", "supported"),
        ("mxfp4_dualscale", "diffusion.mxfp4.online", "tbd"),
        ("w4a8_mxfp", "", "unsupported"),
    ],
)
def test_who_judges_online_schemes_of_diffusion_models_upstream(scheme, row, status):
    verdict = judge(table("upstream-0.5.23"), Question("none", scheme, "linear", "diffusion", "online"), Policy("a5"))
    assert (verdict.row, verdict.status) == (row, status)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("cann", "code", "noted"),
    [
        (None, None, True),
        ("8.0.RC2", "cann-version", False),
        ("8.0.RC2.2", "cann-version", False),
        ("7.0.0", "cann-version", False),
        ("8.0.RC3", None, False),
        ("8.0.RC3.1", None, False),
        ("8.0.0", None, False),
        ("8.0.1", None, False),
        ("8.1.RC1", None, False),
        ("9.0.0-beta.2", None, False),
    ],
)
def test_mx_rows_ask_for_their_cann(name, cann, code, noted):
    judged = 0
    for row, given_row in TABLES[name].items():
        kind = "llm" if row in for_llm(name) else "diffusion"
        verdict = judge(table(name), asked_of(given_row, kind), Policy("a5", ("wip", "tbd"), cann), where=WHERE)
        mx = given_row[1] in MX
        assert code_of(verdict) == (code if mx else None), row
        assert ("8.0.RC3" in verdict.note and row in verdict.note) == (mx and noted), row
        if mx and code:
            assert cann in verdict.problem.what and "8.0.RC3" in verdict.problem.fix
        judged += mx
    assert judged == {"default": 12, "upstream-0.5.23": 17}[name]


FORMATS = ("none", "modelslim", *LLM_ONLY, "bitsandbytes")
SCHEMES = (
    "float", "w8a8_static", "w8a8_dynamic", "w8a8_mix", "w4a4_dynamic", "w4a8_dynamic", "w4a16", "w8a16", *MX, "w2a16",
)  # fmt: skip
QUESTIONS = [
    Question(*parts)
    for parts in product(FORMATS, SCHEMES, ("linear", "moe"), ("llm", "diffusion"), ("offline", "online"))
]


def essence(verdict):
    return verdict.row, verdict.status, code_of(verdict), verdict.note


@pytest.mark.parametrize("name", TABLES)
def test_every_question_has_an_answer(name):
    rows = table(name)
    for asked, tier, allow in product(QUESTIONS, TIERS, POLICIES):
        verdict = judge(rows, asked, Policy(tier, allow), modules=2, where=WHERE)
        if verdict.status == "supported" or verdict.status in allow:
            assert verdict.problem is None and verdict.row in rows.rows
        else:
            assert all((verdict.problem.what, verdict.problem.where, verdict.problem.why, verdict.problem.fix))
        if asked.kind == "diffusion" and asked.layer_type == "moe":
            assert verdict.status == "unsupported"


@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=25, deadline=None)
@given(order=st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(name, order):
    rows = table(name)
    shuffled = list(rows.rows.items())
    order.shuffle(shuffled)
    other = Table(name, dict(shuffled))
    for asked in QUESTIONS:
        assert essence(judge(rows, asked, Policy("a5"))) == essence(judge(other, asked, Policy("a5"))), asked


def test_an_unknown_scheme_is_answered_with_those_that_run():
    verdict = judge(table(), Question("gptq", "w2a16", "linear"), Policy("a2"), modules=5, where=WHERE)
    assert code_of(verdict) == "row-unknown"
    text = text_of(verdict.problem)
    assert "w2a16 on 5 linear modules" in text and "w4a16, w8a16" in verdict.problem.fix and "a2" in verdict.problem.fix
