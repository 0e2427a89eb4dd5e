"""Chat templates are rendered as transformers does, and stopped at limits that transformers does not have."""

import copy
import threading
import time

import pytest

from data.conversation import DataError
from data.encode.template import literals, render
from tests.helpers.families import FAMILIES, build

TURNS = [
    {"role": "user", "content": "Who? "},
    {"role": "assistant", "content": "\n it is\n\nblue"},
    {"role": "user", "content": "<b> & 'so' \\ \"x\" é 日"},
]


@pytest.fixture
def rendered():
    tokenizer = copy.deepcopy(build("llama3"))

    def result(template: str, **limits) -> str:
        tokenizer.chat_template = template
        return render(TURNS, tokenizer, True, "f.jsonl:3", **limits)

    return result


LANGUAGE = [
    "{% for m in messages %}\n  {% if loop.first %}\n{{ loop.length }}{% endif %}\n{{ loop.index }}{{ loop.last }}\n{% endfor %}\n",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content | trim }}{% endfor %}",
    "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m | tojson }}{% else %}none{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.previtem }}{{ m.content }}{% endfor %}",
    "{% for m in messages[::-1] %}{{ m['role'] ~ 1 ~ none ~ m.content }}{% endfor %}",
    "{% generation %}{{ bos_token }}{{ eos_token }}{{ messages[0].content * 3 }}{% endgeneration %}",
    "{{ messages | map(attribute='content') | join('|') }}{{ messages | selectattr('role', 'equalto', 'user') | list }}",
    "{{ messages | tojson(indent=2) }}{{ tools is none }}{{ documents }}{{ add_generation_prompt }}{{ nothing }}",
    "{% macro f(m) %}{{ m.role | upper }}: {{ m.content.split('\\n') }}{{ caller() }}{% endmacro %}"
    "{% for m in messages %}{% call f(m) %}!{% endcall %}{% endfor %}",
    "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t + '%s-%d' % (m.role, loop.index) %}{% endfor %}{{ n.t }}",
    "{% set x %}{{ 'a' | center(9) }}{{ '{:>4}|{}'.format(1, 'b') }}{{ 7 // 2 ** 2 % 3 }}{% endset %}[{{ x }}]{{ x | length }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v | replace('o', '0') | e }}{% endfor %}{{ [1, {'a': (2,)}] }}",
    "{{ 'a%' }}{{ range(3) | list }}{{ 'x'.join(['a', 'b']) }}{{ messages[0].content.strip() }}{{- '  ' -}} end",
    "{{ messages[0].role == 'user' and 1 < 2 <= 3 }}{{ nothing is defined }}{{ messages[0].nothing is none }}{{ nothing is undefined }}",
    "{{ 'user' in [messages[0].role] }}{{ messages[0] is mapping }}{{ 4 is divisibleby(2) }}{{ {'a': 1, messages[0].role: 2} }}",
    "{{ messages | selectattr('role', 'in', ['user']) | list | length }}{{ messages[0].get('tools', []) == [] }}{{ 'a' not in 'b' }}",
    "{% for m in messages recursive %}{{ m.role if m.role else m }}{% if m.role %}{{ loop(['deep']) }}{% endif %}{% endfor %}",
]


@pytest.mark.parametrize("template", [*LANGUAGE, *(f.template for f in FAMILIES.values())])
def test_text_is_that_of_transformers(template):
    tokenizer = copy.deepcopy(build("llama3"))
    tokenizer.chat_template = template
    for generation in (True, False):
        wanted = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=generation)
        assert render(TURNS, tokenizer, generation) == wanted


def doubled(step: str, start: str, use: str = "") -> str:
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set n.x = {step} %}}{{% endfor %}}{use}"


TOO_LARGE = {
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat a list": "{{ 10**10 * [1] }}",
    "power": "{{ 10 ** 100000 }}",
    "squares": doubled("n.x * n.x", "7"),
    "sums": doubled("n.x + n.x", "'aa'"),
    "joins": doubled("n.x ~ n.x", "'aa'"),
    "replaced": doubled("n.x.replace('a', n.x)", "'aa'"),
    "filter replaced": doubled("n.x | replace('a', n.x)", "'aa'"),
    "method": "{{ 'a'.center(10000000000) }}",
    "method of bytes": "{{ 'a'.encode().ljust(10000000000) }}",
    "method of a number": "{{ (1).to_bytes(10000000000, 'big') }}",
    "filter": "{{ 'a' | center(10000000000) }}",
    "indented": "{{ ('\n' * 100000) | indent(10000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent with a star": "{{ '%*d' % (10000000000, 1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format with an argument": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "mapped": "{{ range(100000) | map('string') | map('center', 10000) | join }}",
    "written": "{% set b = 'a' * 1000000 %}{% for i in range(100000) %}{{ b }}{% endfor %}",
    "collected": "{% set b = 'a' * 1000000 %}{% set x %}{% for i in range(9000) %}{{ b }}{% endfor %}{% endset %}",
    "joined by a method": "{{ ('a' * 1000000).join(['b'] * 1000) }}",
    "joined from a generator": "{{ ('a' * 100000).join(range(100000) | map('string')) }}",
    "slices": "{% set b = 'a' * 1000000 %}{% set n = namespace(x=[]) %}{% for i in range(9000) %}"
    "{% set n.x = n.x + [b[1:]] %}{% endfor %}",
    "range": "{% for i in range(1000000000) %}{% endfor %}",
    "source": "a" * 1_000_001,
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_LARGE)
def test_template_that_makes_too_much_is_stopped_before_it_does(rendered, name):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*model\.chat_template"):
        rendered(TOO_LARGE[name])
    assert time.monotonic() - start < 5


def twin(kind: str) -> str:
    one, step = ("[1]", "[n.{0}, n.{0}]") if kind == "list" else ("(1, 1)", "(n.{0}, n.{0})")
    both = "".join(f"{{% set n.{name} = {step.format(name)} %}}" for name in "xy")
    return f"{{% set n = namespace(x={one}, y={one}) %}}{{% for i in range(60) %}}{both}{{% endfor %}}"


ENDLESS = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "nested list written": doubled("[n.x, n.x]", "[1]", "{{ n.x }}"),
    "nested list in json": doubled("[n.x, n.x]", "[1]", "{{ n.x | tojson }}"),
    "nested list as text": doubled("[n.x, n.x]", "[1]", "{{ n.x | string }}"),
    "nested views": doubled("{'a': n.x, 'b': n.x}.items()", "[1]", "{{ n.x }}"),
    "nested by a filter": doubled("range(2) | map(attribute='x', default=n.x) | list", "[1]", "{{ n.x }}"),
    "nested arguments": "{% set n = namespace(x=(1,)) %}{% macro f() %}{% set n.x = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ f(n.x, n.x) }}{% endfor %}{{ n.x }}",
    "nested list in a format": doubled("[n.x, n.x]", "[1]", "{{ '%s' % n.x }}"),
    **{
        f"nested {kind} compared: {use}": f"{twin(kind)}{use}"
        for kind in ("list", "tuple")
        for use in (
            "{{ n.x == n.y }}",
            "{{ n.x in [n.y] }}",
            "{{ 1 < n.x < n.y }}",
            "{{ n.x is eq(n.y) }}",
            "{{ [n.x].index(n.y) }}",
            "{{ [n.x].count(n.y) }}",
            "{{ [n.x] | select('equalto', n.y) | list }}",
            "{{ {}.get(n.x) }}",
            "{{ messages[0][n.x] }}",
            "{{ range(2) | map(attribute='x', default=n.x) | select('eq', n.y) | list }}",
            "{{ range(2) | map(attribute='x', default=n.x) | unique | list }}",
            "{{ {n.x: 1} }}",
        )
        if kind == "tuple" or ("{}" not in use and "{n.x: 1}" not in use)
    },
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_template_is_stopped_by_time(rendered, name):
    with pytest.raises(DataError, match=r"takes more than 0\.2 s .* set model\.chat_template") as error_info:
        rendered(ENDLESS[name], seconds=0.2)
    assert "over its limits" in error_info.value.kind


def test_namespaces_that_hold_each_other_are_not_written_out(rendered):
    assert rendered(doubled("namespace(a=n.x, b=n.x)", "[1]", "{{ [n.x] }}")) == "[<Namespace>]"


def test_limits_hold_in_any_thread(rendered):
    errors = []

    def work() -> None:
        try:
            rendered(ENDLESS["loops"], seconds=0.1)
        except DataError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=10)
    assert len(errors) == 1


def test_size_limit_grows_with_the_messages(rendered):
    template = "{% for i in range(20) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}"
    assert len(rendered(template, characters=10)) == 20 * sum(len(m["content"]) for m in TURNS)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{{ messages.foo.bar }}", "no attribute"),
        ("{% if %}", "Expected an expression"),
        ("{{ 'x' | nosuch }}", "No filter"),
        ("{% include 'other' %}", "no loader"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ lipsum() }}", "undefined"),
    ],
)
def test_template_that_fails_is_an_error_with_the_turns_and_the_remedy(rendered, template, reason):
    with pytest.raises(DataError, match=rf"f\.jsonl:3: .*user, assistant, user: .*{reason}.*set model\.chat_template"):
        rendered(template)


def test_literals_are_the_texts_of_a_template():
    assert literals("<s>{{ '[INST] ' + x }}{% if x == 'user' %}end{% endif %}") == ("<s>", "end", "[INST] ", "user")
