import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from framework.errors import InputError
from framework.text.chat import render_chat

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# blocks on lines of their own, loop controls, namespace, tojson, generation: what published templates use
FULL = """{{- bos_token }}
{%- set ns = namespace(found=false) %}
{% for message in messages %}
    {%- if message.role == "skip" %}{% continue %}{% endif %}
    {% if message['role'] == 'user' %}
    [INST] {{ message['content'] | trim }} [/INST]
    {% elif message['role'] == 'assistant' %}
    {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {% set ns.found = true %}
    {% endif %}
{% endfor %}
{{ {"b": 1, "a": ["<é>"]} | tojson }}{{ ns.found }}
{%- if tools %}never{% endif %}
"""
TALK = [
    {"role": "user", "content": "  Hi <there> & 'you' "},
    {"role": "skip", "content": "x"},
    {"role": "assistant", "content": "Hello é"},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize("template", [CHATML, FULL])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(template, add_generation_prompt):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template(
        [TALK], chat_template=template, add_generation_prompt=add_generation_prompt, **tokens
    )
    assert render_chat(template, TALK, add_generation_prompt=add_generation_prompt, **tokens) == expected


def test_what_a_template_says_is_wrong_reaches_the_user():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="chat-template") as error:
        render_chat(template, TALK, bos_token="", eos_token="")
    assert "roles must alternate" in error.value.problems[0].why


@pytest.mark.parametrize("name", ["messages.__class__", "raise_exception.__globals__", "'a'.__len__"])
def test_what_is_behind_a_value_does_not_exist_for_a_template(name):
    template = "{{ " + name + " is defined }}{{ " + name + " }}"
    assert render_chat(template, TALK, bos_token="", eos_token="") == "False"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ dict.mro() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% do messages.append(1) %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% for a in range(1000000000) %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 10 ** 10000000 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0].missing.thing }}",
        "{{ 1 + 'a' }}",
        "{% if %}",
        "{{ x",
    ],
)
@pytest.mark.timeout(60)
def test_hostile_and_broken_templates_are_refused(template):
    with pytest.raises(InputError) as error:
        render_chat(template, TALK, bos_token="", eos_token="")
    assert [problem.code for problem in error.value.problems] == ["chat-template"]
