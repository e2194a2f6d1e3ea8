"""Chat templates end within bounds on steps and sizes, and malformed files are refused in a line."""

from __future__ import annotations

import json

import pytest

from headstart.data import template_limits
from headstart.data.chat_template import ChatTemplate
from headstart.data.tokenizer_source import TokenizerDirectory
from headstart.errors import UsageError

STEPS, SIZE = "it takes more than 50,000 steps", "it makes a value of more than [0-9,]+ characters or items"
WIDTH = "a format of such a width is not allowed"
BOMBS = {
    STEPS: [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in [1] recursive %}{% if loop.depth < 3 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
        "{% set n=namespace(a='a') %}{% for i in range(60) %}{% set n.a=n.a~n.a %}{% endfor %}",
        "{% set n=namespace(a='a') %}{% for i in range(60) %}{% set n.a=n.a+n.a %}{% endfor %}",
        "{% macro f(x) %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endmacro %}{{ f('a'*9999)|length }}",
        "{% for i in range(9999) %}{{ range(9999)|list|length }}{% endfor %}",
        "{{ range(9000)" + "|select" * 8 + "|list|length }}",
        "{{ 'a'.join(range(99999)|map('string'))|length }}",
        "{% for i in range(20) %}{% set x = range(999)|sort %}{% endfor %}",
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
    ],
    SIZE: [
        "{{ 'a'*10**15 }}",
        "{{ 10**15*'a' }}",
        "{{ 'a'|center(10**15) }}",
        "{{ 'a'.ljust(10**15) }}",
        "{{ [1]|batch(10**15, 1)|list }}",
        "{{ ('a\n'*100000)|indent(10**15) }}",
        "{{ ('\t'*100000).expandtabs(10**9) }}",
        "{{ [1]|tojson(indent=10**15) }}",
        "{{ ('a'*10**6)|replace('a', 'b'*10**6) }}",
        "{{ ('a'*10**6).replace('a', 'b'*10**6) }}",
        "{{ ('b'*10**6).join(['a']*20000) }}",
        "{{ (['a']*20000)|join('b'*10**6) }}",
    ],
    "a number of so many digits is not allowed": ["{{ 10**(10**8) }}", "{{ (10**999 * 10**999)|length }}"],
    WIDTH: [
        "{{ '%1000000000000000d'|format(1) }}",
        "{{ '%1000000000000000d' % 1 }}",
        "{{ '%*d' % (10**15, 1) }}",
        "{{ '{:1000000000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**15) }}",
        "{{ '{x:1000000000000000}'.format_map({'x': 1}) }}",
    ],
    "a sum of lists is not allowed": ["{{ ([[1] * 10] * 10)|sum(start=[]) }}"],
    "translate is not allowed": ["{{ ('a'*10000).translate({97: 'b'*10000}) }}"],
    "striptags of more than 65,536 characters is not allowed": ["{{ ('<' * 10**5)|striptags }}"],
    "its source has more than 20,000 tokens": ["{{ x }}" * 7_000],
    "'lipsum' is undefined": ["{{ lipsum(n=100000,min=1000,max=2000) }}"],
    "maximum recursion depth exceeded": ["{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}"],
    "Range too big": ["{{ range(10**9) }}"],
}
"""Templates by the reason that must stop them. Without its guard, each fails otherwise: no machine has such memory."""


@pytest.mark.parametrize(("why", "source"), [(why, source) for why, sources in BOMBS.items() for source in sources])
def test_a_template_without_end_or_measure_is_refused(why, source, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_STEPS", 50_000)
    with pytest.raises(UsageError, match=rf"does not take these messages \({why}"):
        ChatTemplate(source).render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "made", ["{{ s }}{{ s }}{{ s }}", "{{ (s ~ s ~ s)|length }}", "{{ (s + s + s)|length }}", "{{ (s|e)|length }}"]
)
def test_sizes_are_bounded_before_the_steps_run_out(made):
    with pytest.raises(UsageError, match=SIZE):
        ChatTemplate("{% set s = '<' * 2**23 %}" + made).render([])


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
