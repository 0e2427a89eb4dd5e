"""Chat templates are rendered as transformers does, and stopped at limits that transformers does not have."""

import copy
import signal
import threading
import time
from pathlib import Path

import pytest
import trl

from data.conversation import DataError
from data.encode.template import Render, literals, render_all
from tests.helpers.families import FAMILIES, build
from tests.helpers.render import render

pytestmark = pytest.mark.heavy

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


TRL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
CONVERSATIONS = [TURNS, TURNS[:1], [{"role": "system", "content": "Be short."}, *TURNS[:2]]]


@pytest.mark.parametrize("path", TRL, ids=lambda path: path.stem)
def test_templates_that_trl_ships_render_as_in_transformers(path: Path):
    tokenizer = copy.deepcopy(build("llama3"))
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    texts = []
    for turns in CONVERSATIONS:
        for generation in (True, False):
            try:
                wanted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
            except Exception:
                with pytest.raises(DataError, match="refuses the turns"):
                    render(turns, tokenizer, generation)
            else:
                texts.append(render(turns, tokenizer, generation))
                assert texts[-1] == wanted
    assert texts


def doubled(step: str, start: str, use: str = "") -> str:
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set n.x = {step} %}}{{% endfor %}}{use}"


MEGABYTE = "{% set a = 'a' * 1000000 %}"
HOSTILE = {
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat a list": "{{ 10**10 * [1] }}",
    "power": "{{ 10 ** 99999999 }}",
    "power in a filter": "{{ 1 | round(99999999, 'ceil') }}",
    "squares": doubled("n.x * n.x", "7"),
    "sums": doubled("n.x + n.x", "'aa'"),
    "joins": doubled("n.x ~ n.x", "'aa'"),
    "method": "{{ 'a'.center(10000000000) }}",
    "method of bytes": "{{ 'a'.encode().ljust(10000000000) }}",
    "method of a number": "{{ (1).to_bytes(10000000000, 'big') }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "format with an argument": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "written": MEGABYTE + "{% for i in range(100000) %}{{ a }}{% endfor %}",
    "collected": MEGABYTE + "{% set x %}{% for i in range(9000) %}{{ a }}{% endfor %}{% endset %}",
    "joined from a generator": "{{ ('a' * 100000).join(range(100000) | map('string')) }}",
    "slices": MEGABYTE + "{% set n = namespace(x=[]) %}{% for i in range(9000) %}{% set n.x = n.x + [a[1:]] %}{% endfor %}",
    "bytes": MEGABYTE + "{% set n = namespace(x=[]) %}{% for i in range(9000) %}{% set n.x = n.x + [a.encode('utf-32')] %}{% endfor %}",
    "sum of lists": "{{ range(100000) | batch(1) | sum(start=[]) | length }}",
    "links": "{{ ('www.' * 1000000) | urlize }}",
    "text sought from its end": "{{ ('a' * 4000000).rfind('ab' + 'a' * 2000000) }}",
    "numbers of one hash": "{{ range(0, 99999 * (2**61 - 1), 2**61 - 1) | unique | list | length }}",
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "nested list written": doubled("[n.x, n.x]", "[1]", "{{ n.x }}"),
    "nested list in json": doubled("[n.x, n.x]", "[1]", "{{ n.x | tojson }}"),
    "nested tuple as a key": doubled("(n.x, n.x)", "(1, 1)", "{{ {n.x: 1} }}"),
    "nested namespaces": doubled("namespace(a=n.x, b=n.x)", "[1]", "{{ [n.x] }}"),
    "only for some rows": "{% if messages[2].content != 'probe' %}{{ 1 | round(99999999, 'ceil') }}{% endif %}",
    "nested statements": "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
    "nested parentheses": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "source": "a" * 1_000_001,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_template_without_end_in_time_or_size_is_stopped(rendered, name):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*set model\.chat_template"):
        rendered(HOSTILE[name], seconds=0.2)
    assert time.monotonic() - start < 5
    assert rendered("{{ messages[0].content }}") == TURNS[0]["content"]


def test_limit_of_time_is_named(rendered):
    with pytest.raises(DataError, match=r"takes more than 0\.2 s .* set model\.chat_template") as error_info:
        rendered(HOSTILE["loops"], seconds=0.2)
    assert error_info.value.kind == "chat template over its limits"


@pytest.mark.parametrize("name", ["repeat", "method", "slices"])
def test_limit_of_memory_is_named(rendered, name):
    with pytest.raises(DataError, match=r"needs more than 1,500 MiB") as error_info:
        rendered(HOSTILE[name])
    assert error_info.value.kind == "chat template over its limits"


def test_limits_hold_in_any_thread(rendered):
    results = []

    def work(template: str) -> None:
        try:
            results.append(rendered(template, seconds=0.1))
        except DataError as error:
            results.append(error.kind)

    threads = [
        threading.Thread(target=work, args=(t,)) for t in (HOSTILE["loops"], "{{ 1 }}", HOSTILE["calls"], "{{ 1 }}")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert sorted(results) == ["1", "1", *["chat template over its limits"] * 2]


def test_render_that_is_interrupted_leaves_no_answer_to_the_next(rendered):
    """Ctrl-C while a template is rendered."""

    def interrupt(*_) -> None:
        raise InterruptedError

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(InterruptedError):
            rendered("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}late")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert rendered("next") == "next"


def test_renders_that_are_interrupted_between_two_replies_leave_none_to_the_next(rendered):
    """Ctrl-C while a row is tokenized and the process renders the rows after it."""

    def interrupt(texts: list[str]) -> None:
        raise InterruptedError

    tokenizer = copy.deepcopy(build("llama3"))
    with pytest.raises(InterruptedError):
        render_all([Render(TURNS, [(1, True)])] * 9, tokenizer, interrupt)
    assert rendered("next") == "next"


def test_size_limit_grows_with_the_messages(rendered):
    template = "{% for i in range(20) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}"
    assert len(rendered(template, characters=10)) == 20 * sum(len(m["content"]) for m in TURNS)
    with pytest.raises(DataError, match=r"makes more than [\d,]+ characters"):
        rendered(template * 6, characters=10)


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
