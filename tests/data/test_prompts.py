"""Turns written from columns, and system turns for templates that have none."""

import copy
import json
from pathlib import Path

import pytest
import trl

from data.conversation import DataError
from data.encode.chat import encode, encode_prompt, encode_turns
from data.encode.frame import SERVED, frame_of
from data.readers.source import FileSource, read_all
from eval.client import server_predictions
from sft.errors import RecipeError
from sft.recipe.load import check_recipe
from sft.serving.chat import system_of_rows
from sft.training.examples import other_questions
from tests.helpers.fake_server import completion, serving
from tests.helpers.families import build, build_for
from tests.helpers.recipes import with_key

SQL = [
    {"schema": "boats(name, year)", "question": "How many?", "sql": "SELECT COUNT(*) FROM boats", "year": 3},
    {"schema": "boats(name, year)", "question": "Which {is} the oldest?", "sql": "SELECT name FROM boats", "year": 4},
]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "sql.jsonl", SQL)


def read(path, **keys):
    return read_all(FileSource(path, **keys), "instruct")


def test_turns_are_written_from_columns(path):
    rows = read(path, system="SQL of {year}.", prompt="{schema}\n{{}} {question}", completion="{sql};")
    assert [m["content"] for m in rows[1].messages] == [
        "SQL of 4.", "boats(name, year)\n{} Which {is} the oldest?", "SELECT name FROM boats;",
    ]  # fmt: skip
    assert rows[1].answers == ("SELECT name FROM boats;",)


def test_rows_of_one_text_before_the_last_column_share_it(path):
    first, second = read(path, prompt="{schema}\n{question}", completion="{sql}")
    assert first.context == second.context == "boats(name, year)"
    first, second = read(path, prompt="{question}", completion="{sql}")
    assert first.context != second.context


def test_prompt_goes_with_an_answer_of_its_own_name(path):
    assert read(path, prompt="{question}", columns={"completion": "sql"})[0].answer == SQL[0]["sql"]


def test_system_turn_of_a_row_comes_first(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    own = {"messages": [{"role": "system", "content": "own"}, *turns]}
    weighed = {"messages": [*turns, turns[0], {**turns[1], "weight": 0}]}
    rows = read(write(tmp_path / "m.jsonl", [own, weighed]), system="the recipe's")
    assert [row.messages[0]["content"] for row in rows] == ["own", "the recipe's"]
    assert rows[1].not_learnt == (4,)


@pytest.mark.parametrize(
    "keys", [{"prompt": "{schem}"}, {"prompt": "{schema}", "completion": "{sq}"}, {"system": "{sq}"}]
)
def test_column_that_no_row_has_stops_with_the_nearest(path, keys):
    with pytest.raises(DataError, match=r"no row has a column 'sq?(chem)?'.*did you mean (schema|sql)\?"):
        read(path, **{"completion": "{sql}", "prompt": "{question}"} | keys)


def test_row_without_the_column_is_a_defect_with_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [SQL[0], {"schema": "x", "sql": "y"}, {**SQL[1], "question": None}])
    with pytest.raises(DataError) as error:
        read(path, prompt="{schema}{question}", completion="{sql}")
    assert f"{path}:2: prompt" in str(error.value)
    assert f"{path}:3: prompt: column question: null" in str(error.value)


def test_task_with_an_instruction_takes_no_system(tmp_path):
    path = write(tmp_path / "n.jsonl", [{"label": "sci.space", "text": "a post"}])
    with pytest.raises(DataError, match=r":1: system: "):
        read_all(FileSource(path, system="Be brief."), "newsgroups")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"prompt": "{a"}, r"data\.train\[0\]\.prompt"),
        ({"prompt": "a}"}, r"data\.train\[0\]\.prompt"),
        ({"system": " "}, r"data\.train\[0\]\.system"),
        ({"prompt": "{a}", "format": "messages"}, "prompt is for format"),
        ({"prompt": "{a}", "columns": {"prompt": "q"}}, "columns.prompt"),
    ],
)
def test_keys_that_cannot_be_meant_are_refused(keys, named, path):
    with pytest.raises(RecipeError, match=named):
        check_recipe(with_key("data.train", [{"path": path, **keys}]))


def test_held_out_data_is_asked_as_the_training_data_unless_it_says_otherwise(path):
    tree = with_key("data.train", [{"path": path, "system": "s", "prompt": "{question}", "completion": "{sql}"}])
    tree["task"] = "instruct"
    recipe = check_recipe({**tree, "eval": {"data": "data/samples/instructions.jsonl"}})
    held_out = recipe.eval.data
    assert (held_out.system, held_out.prompt, held_out.completion) == ("s", "{question}", "{sql}")
    other = check_recipe({**tree, "eval": {"data": {"path": "data/samples/instructions.jsonl", "prompt": None}}})
    assert (other.eval.data.system, other.eval.data.prompt, other.eval.data.completion) == ("s", None, "{sql}")
    assert other_questions(recipe, path).prompt == "{question}"
    assert other_questions(None, path).prompt is None
    assert other_questions(check_recipe(tree), path).completion == "{sql}"


SYSTEM = {"role": "system", "content": "Be brief."}
USER, ANSWER = {"role": "user", "content": "Late?"}, {"role": "assistant", "content": "no, it is early"}


def conversation(tmp_path, *messages):
    return read(write(tmp_path / "m.jsonl", [{"messages": list(messages)}]))[0]


def silent() -> str:
    """A template that leaves system turns out without a word."""
    return build("chatml").chat_template.replace("in messages", "in messages if turn.role != 'system'")


def without_system_turn(name: str):
    tokenizer = copy.deepcopy(build(name))
    if name == "chatml":
        tokenizer.chat_template = silent()
    return tokenizer


@pytest.mark.parametrize("name", ["mistral_v1", "chatml"])
def test_instruction_goes_before_the_users_text_if_the_template_has_no_system_turn(name, tmp_path):
    tokenizer = without_system_turn(name)
    joined = {**USER, "content": "Be brief.\n\nLate?"}
    with_it = encode(conversation(tmp_path, SYSTEM, USER, ANSWER), tokenizer, 512)
    same = encode(conversation(tmp_path, joined, ANSWER), tokenizer, 512)
    assert (with_it.ids, with_it.loss_mask) == (same.ids, same.loss_mask)
    assert encode_prompt([SYSTEM, USER], tokenizer) == encode_prompt([joined], tokenizer)


def test_turn_that_is_not_learnt_is_not_learnt_there_either(tmp_path):
    row = conversation(tmp_path, SYSTEM, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "content": "yes"})
    example = encode(row, build("mistral_v1"), 512)
    learnt = [i for i, m in zip(example.ids, example.loss_mask, strict=True) if m]
    assert build("mistral_v1").decode(learnt).strip() == "yes</s>"


@pytest.mark.parametrize("known", [True, False])
def test_server_is_asked_without_a_system_turn_if_its_template_has_none(known, tmp_path):
    seen = []

    def answer(request):
        seen.append(request["messages"])
        if request["messages"][0]["role"] == "system":
            return 400, {"error": {"message": "System role not supported", "code": 400}}
        return completion("no")

    frame = frame_of(build("mistral_v1")) if known else SERVED
    with serving(answer, "m") as url:
        (got,) = server_predictions(url, "m", [conversation(tmp_path, SYSTEM, USER, ANSWER)], 9, frame=frame)
    assert got.text == "no"
    assert seen[-1] == [{**USER, "content": "Be brief.\n\nLate?"}]
    assert len(seen) == (1 if known else 2)


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_no_template_that_trl_ships_loses_the_instruction(template, tmp_path):
    tokenizer = build_for(template.read_text(encoding="utf-8"))
    try:
        ids = encode_prompt([SYSTEM, USER], tokenizer)
        encode_turns(conversation(tmp_path, SYSTEM, USER, ANSWER), tokenizer, 4096)
    except DataError:  # of images only, or without a token that ends a turn
        with pytest.raises(DataError):
            encode_turns(conversation(tmp_path, USER, ANSWER), tokenizer, 4096)
    else:
        assert tokenizer.decode(ids).count("Be brief.") == 1


def test_chat_starts_with_the_system_prompt_of_the_recipe(tmp_path):
    for system, started in (("'{{a}} b'", "{a} b"), ("'{schema}'", None), ("null", None)):
        (tmp_path / "recipe.yaml").write_text(
            f"task: instruct\nmodel: {{base: owner/model}}\n"
            f"data: {{train: {{path: data/samples/instructions.jsonl, system: {system}}}}}\n"
        )
        assert system_of_rows(tmp_path) == started
