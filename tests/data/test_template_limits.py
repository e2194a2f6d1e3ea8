"""Chat templates end within bounds on steps and sizes, and malformed files are refused in a line."""

from __future__ import annotations

import json

import pytest

from headstart.data import template_limits
from headstart.data.chat_template import ChatTemplate
from headstart.data.tokenizer_source import TokenizerDirectory
from headstart.errors import UsageError

BOMBS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a'*10**10 }}",
    "{{ 10**(10**8) }}",
    "{% set n=namespace(a='a') %}{% for i in range(60) %}{% set n.a=n.a~n.a %}{% endfor %}",
    "{% set n=namespace(a='a') %}{% for i in range(60) %}{% set n.a=n.a+n.a %}{% endfor %}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ lipsum(n=100000,min=1000,max=2000) }}",
    "{{ ('a\n'*100000)|indent(1000) }}",
    "{{ ('a'*10000)|replace('a', 'b'*10000) }}",
    "{{ ('a'*10000).replace('a', 'b'*10000) }}",
    "{{ ('b'*10000).join(['a']*10000) }}",
    "{{ (['a']*10000)|join('b'*10000) }}",
    "{{ [1]|batch(10**10, 1)|list }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(x) %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endmacro %}{{ f('a'*9999)|length }}",
    "{% for i in range(9999) %}{{ range(9999)|list|length }}{% endfor %}",
    "{{ range(10**9) }}",
    "{{ ([[1] * 10] * 10)|sum(start=[]) }}",
    "{{ ('<' * 10**5)|striptags }}",
    "{% for i in range(99) %}{% set x = range(9999)|sort %}{% endfor %}",
    "{% for i in range(9999) %}{% set x = 'a' * 2**23 %}{% endfor %}",
    "{% set s = 'a' * 2**23 %}{% for i in range(9999) %}{% set x = s[1:] %}{% endfor %}",
    "{% set s = 'a' * 2**23 %}{% for i in range(9999) %}{% set x = 'b' in s %}{% endfor %}",
    "{% set s = 'a' * 2**23 %}{% for i in range(9999) %}{% set x = s ~ 'a' %}{% endfor %}",
    "{% set s = [1] * 1000 %}{% set s = [s] * 1000 %}{% set s = [s] * 1000 %}{{ s }}",
    "{% set s = [1] * 1000 %}{% set s = [s] * 1000 %}{% set s = [s] * 1000 %}{{ s|tojson|length }}",
    "{% set s = [1] * 1000 %}{% set s = [s] * 1000 %}{% set s = [s] * 1000 %}{{ s|string|length }}",
    "{% for i in range(999) %}" + "{% set x = 1 %}" * 200 + "{% endfor %}",
    "{% macro f() %}" + "{% set x = 1 %}" * 200 + "{% endmacro %}{% for i in range(999) %}{{ f() }}{% endfor %}",
    "{% macro f() %}{% for i in range(999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call f() %}" + "{% set x = 1 %}" * 200 + "{% endcall %}",
    "{% for i in range(999) %}" + "{{ x|trim }}" * 20 + "{% endfor %}",
    "{{ x }}" * 100_000,
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_without_end_or_measure_is_refused(source, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_STEPS", 50_000)
    with pytest.raises(UsageError, match="does not take these messages"):
        ChatTemplate(source).render([{"role": "user", "content": "a"}])


def test_ordinary_templates_are_untouched(monkeypatch):
    source = (
        "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length ~ m['content'] + '!' }}"
        "{% if loop.last %}{{ loop.previtem.content|trim }}{% endif %}{% endfor %}"
        "{{ [1, 2]|map('string')|join(', ') }}{{ '%d-%s'|format(7 % 4, 'x') }}{{ {'a': 1}|tojson(indent=2) }}"
    )
    said = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
    assert ChatTemplate(source).render(said) == '1/2 a !2/2b!a1, 23-x{\n  "a": 1\n}'
    monkeypatch.setattr(template_limits, "MAX_STEPS", 1000)  # of each rendering alone
    for _ in range(100):
        ChatTemplate(source).render(said)


@pytest.mark.parametrize("value", [[{"a": 1}], [1, 2], 5, {"a": 1}, [{"name": "default", "template": 5}], "x" * 2**21])
def test_a_template_of_another_type_is_refused(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(UsageError, match=r"tokenizer_config.json: (the chat template|chat_template) must be"):
        TokenizerDirectory(tmp_path).chat_template()


def test_a_template_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(UsageError, match=r"chat_template.jinja: not UTF-8"):
        TokenizerDirectory(tmp_path).chat_template()
