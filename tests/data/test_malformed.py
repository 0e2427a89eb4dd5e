"""Malformed files: every defect is reported with its place and remedy, and no other row is lost."""

import re

import pytest

from data.conversation import DataError, Ledger
from data.readers import files
from data.readers.source import FileSource, read_all, read_rows
from tests.helpers.places import ROOT

MALFORMED = ROOT / "tests" / "data" / "malformed"
FILES = sorted(path for path in MALFORMED.iterdir() if not path.name.startswith("."))

# file, rows, conversations, beginnings of the messages with "FILE" for the path and "…" for any words
ROW_DEFECTS = [
    ("latin1.jsonl", 3, 2, ["FILE:2: byte 16 of the line: byte 0xE9, which is not UTF-8; … iconv"]),
    ("latin1.json", 2, 1, ["FILE:3: byte 0xE9, which is not UTF-8"]),
    ("latin1.csv", 3, 2, ["FILE:3: byte 0xE9, which is not UTF-8"]),
    ("trailing_comma.jsonl", 3, 2, ["FILE:2: column 35: trailing comma; remove it"]),
    ("comma_after_object.jsonl", 3, 2, ["FILE:2: ',' after the object, … column 34; remove it"]),
    ("two_on_a_line.jsonl", 3, 2, ["FILE:2: two objects on one"]),
    ("raw_newline.jsonl", 4, 2, ["FILE:2: column 12: this text has no", "FILE:3: column 1: not JSON"]),
    ("raw_tab.jsonl", 3, 2, [r"FILE:2: column 16: raw control character U+0009 … \u0009"]),
    ("cut_off.jsonl", 2, 1, ["FILE:2: column 30: ends inside"]),
    ("single_quotes.jsonl", 3, 2, ["FILE:2: column 2: single quotes; … double quotes"]),
    ("nan.jsonl", 4, 2, ["FILE:2: NaN is not JSON", "FILE:3: -Infinity is not JSON"]),
    ("duplicate_keys.jsonl", 3, 2, ["FILE:2: key 'completion' occurs twice; keep one"]),
    ("depth_bomb.jsonl", 3, 2, ["FILE:2: nested too deeply"]),
    ("long_number.jsonl", 3, 2, ["FILE:2: a number … 4300 digits"]),
    ("not_an_object.jsonl", 5, 2, ["FILE:2: list ['p', 'c'] where an object", "FILE:3: text 'p' where", "FILE:4: number 17 where"]),
    ("text_only.jsonl", 3, 2, ["FILE:2: column 1: not JSON: Expecting value at 'What is the capital '"]),
    ("long_value.jsonl", 3, 2, ["FILE:2: completion: list ['secret secret"]),
    ("list_with_flaws.json", 4, 2, ["FILE:3: NaN is not JSON", "FILE:4: text 'text' where an object"]),
    ("lone_surrogate.jsonl", 3, 2, ["FILE:2: prompt: lone surrogate U+D83D at character 6; half"]),
    ("surrogate_in_key.jsonl", 5, 2, [r"FILE:2: x\ud83d\n: lone surrogate U+D83D at character 2", "FILE:3: meta.tags[1]: lone surrogate U+DE00 at character 2", "FILE:4: id: lone surrogate U+D800 at character 2"]),
    ("nul.jsonl", 3, 2, ["FILE:2: prompt: NUL (U+0000) at character 2"]),
    ("number_for_text.jsonl", 5, 2, ["FILE:2: completion: number 4 where text", "FILE:3: completion: boolean True", "FILE:4: completion: object {'a': 1}"]),
    ("number_beyond_64_bits.jsonl", 3, 2, ["FILE:2: completion: number beyond 64 bits 9223372036854775808 where text"]),
    ("null_output.jsonl", 3, 2, ["FILE:2: output: null where text"]),
    ("empty_output.jsonl", 3, 2, ["FILE:2: output: empty text"]),
    ("white_space_output.jsonl", 3, 2, [r"FILE:2: output: only white space ' \n'"]),
    ("missing_output.jsonl", 3, 2, ["FILE:2: output: missing, … instruction, input; … alpaca: add it"]),
    ("unknown_keys.jsonl", 3, 2, ["FILE:2: the row's keys … frage, antwort, … messages, sharegpt, alpaca"]),
    ("misspelt_key.jsonl", 3, 2, ["FILE:2: prompt: missing, … promt, completion; … prompt_completion"]),
    ("wrong_order.jsonl", 4, 2, ["FILE:2: user and assistant … found user, user, assistant", "FILE:3: user and assistant … found assistant, user"]),
    ("two_systems.jsonl", 3, 2, ["FILE:2: turn 2: a second system"]),
    ("system_not_first.jsonl", 3, 2, ["FILE:2: turn 2: system; … first"]),
    ("last_turn_user.jsonl", 3, 2, ["FILE:2: the last turn … user's; … assistant's"]),
    ("list_content.jsonl", 3, 2, ["FILE:2: messages[0].content: list [{'type': 'image_url', 'image_url': … where text … join its parts"]),
    ("unknown_role.jsonl", 3, 2, ["FILE:2: messages[1].role: 'bot'; must be one of system, developer, user, assistant"]),
    ("turn_weight.jsonl", 2, 1, ["FILE:2: messages[1].weight: 0.5; a turn is learnt or not"]),
    ("image_key.jsonl", 2, 1, ["FILE:2: images: only text can be trained on"]),
    ("two_thoughts.jsonl", 2, 1, ["FILE:2: messages[1]: reasoning_content and thinking hold two thoughts"]),
    ("tool_turn.jsonl", 4, 2, ["FILE:2: messages[1].tool_calls[0]: {'id': '1'} is no call", "FILE:3: user and assistant … found user, tool"]),
    ("no_messages.jsonl", 3, 2, ["FILE:2: messages: no turn"]),
    ("messages_as_text.jsonl", 3, 2, ["FILE:2: messages: text 'user: u' where … list of turns"]),
    ("turn_as_text.jsonl", 3, 2, ["FILE:2: messages[0]: text 'u' where a turn is expected"]),
    ("turn_without_role.jsonl", 3, 2, ["FILE:2: messages[0]: no role, only content"]),
    ("sharegpt_starts_with_gpt.jsonl", 3, 2, ["FILE:2: user and assistant must take turns, the user first"]),
    ("history_not_pairs.jsonl", 3, 2, ["FILE:2: history: ['u', 'a'] where … [user, assistant] pairs"]),
    ("wrong_quote.csv", 3, 2, ["FILE:3: not CSV: ',' expected after '\"'; put cells with"]),
    ("too_many_cells.csv", 3, 2, ["FILE:3: 3 cells … 2 columns; put cells"]),
    ("missing_cell.csv", 3, 2, ["FILE:3: completion: empty text"]),
    ("squad_offset.json", 2, 1, ["FILE: q1: answers[0]: 'Paris' is not at answer_start 14 (the passage has ' Pari')"]),
    ("squad_negative_offset.json", 2, 1, ["FILE: q1: answers[0]: '1999.' is not at answer_start -5"]),
    ("squad_contradiction.json", 2, 1, ["FILE: q1: is_impossible: True contradicts"]),
    ("squad_id_twice.json", 2, 1, ["FILE: q1: id: 'q1' occurs … ids must"]),
    ("squad_no_id.json", 2, 1, ["FILE:1: paragraphs[0].qas[1]: {'question': 'Where?', 'answers': []} has no id"]),
    ("squad_null_id.json", 2, 1, ["FILE:1: paragraphs[0].qas[1]: {'id': None, 'question': 'Where?', 'answers': [{'text': '... has no id"]),
    ("squad_null_id.jsonl", 4, 3, ["FILE:2: id: null; give every"]),
    ("squad_surrogate.json", 3, 2, [r"FILE: q1\ud800\n: id: lone surrogate U+D800 at character 3"]),
    ("squad_nan.json", 2, 0, ["FILE:1: NaN is not JSON; … (no question "] * 2),
    ("squad_no_paragraphs.json", 3, 1, ['FILE:1: article: keys title, no list under "paragraphs"', 'FILE:1: paragraphs[0]: keys context, no list under "qas"']),
    ("unknown_label.jsonl", 4, 2, ["FILE:2: label: 'Sci.Space ' … 20 newsgroups; … 'sci.space'?", "FILE:3: label: 'cats' … 20 newsgroups; … alt.atheism"]),
]  # fmt: skip
# file, rows before reading stops, message; the number of lost rows is unknown, so the run stops
BREAKS = [
    ("utf16.jsonl", 0, "FILE: UTF-16 (… FF FE); convert it: iconv -f utf-16 -t utf-8 utf16.jsonl"),
    ("utf16_without_mark.jsonl", 0, "FILE: UTF-16 … (NUL is byte 2); convert it: iconv -f utf-16le"),
    ("empty.jsonl", 0, "FILE: holds no row"),
    ("empty.json", 0, "FILE: holds no row"),
    ("blank_lines.jsonl", 0, "FILE: holds no row"),
    ("header_only.csv", 0, "FILE: holds no row"),
    ("empty_list.json", 0, "FILE: holds no row"),
    ("truncated.jsonl.gz", 56, "FILE: broken gzip file: Compressed file"),
    ("wrong_suffix.txt", 0, "FILE: suffix '.txt'; … .json, .jsonl, .csv, .parquet"),
    ("not_parquet.parquet", 0, "FILE: can't be read: Parquet magic"),
    ("list_in_jsonl.jsonl", 0, "FILE:1: a JSON list … .json"),
    ("pretty_printed.jsonl", 0, "FILE:1: pretty-printed JSON … jq -c ."),
    ("list_trailing_comma.json", 1, "FILE:3: trailing comma after"),
    ("list_without_comma.json", 1, 'FILE:3: \'{"prompt": "p", "com\' where , or ] is expected'),
    ("list_cut_off.json", 1, "FILE:3: column 17: this text has no"),
    ("list_and_more.json", 1, r"FILE:2: '[]\n' where the end"),
    ("column_twice.csv", 0, "FILE:1: column 'prompt' occurs twice"),
    ("wrong_quote_in_header.csv", 0, "FILE:1: not CSV: ',' expected after '\"'; put cells"),
    ("latin1_header.csv", 0, "FILE:1: header: byte 0xE9, which is not UTF-8"),
    ("semicolons.csv", 0, "FILE:1: columns 'prompt;completion' are separated by ';'"),
    ("tabs.csv", 0, r"FILE:1: columns 'prompt\tcompletion' are separated by '\t'"),
    ("open_quote.csv", 1, "FILE:3: not CSV: unexpected end of data; put cells"),
    ("wrong_quote_over_lines.csv", 1, "FILE:3: not CSV: ',' expected after '\"'; put cells"),
    ("squad_cut_off.json", 0, "FILE:1: column 31: ends inside"),
]  # fmt: skip
# file, rows, notes; all rows are used
NOTES = [
    ("utf8_bom.jsonl", 1, ["FILE: begins with … byte order mark"]),
    ("crlf.jsonl", 2, ["FILE: CRLF line ends … line 1"]),
    ("gzip_named.jsonl", 1, []),
    ("plain_named.jsonl.gz", 1, []),
    ("line_separator.jsonl", 1, ["FILE:1: U+2028 in turn 1, character 4"]),
    ("control_characters.jsonl", 1, ["FILE:1: U+001B in turn 1, character 2"]),
    ("replacement_character.jsonl", 1, ["FILE:1: U+FFFD in turn 1, character 4"]),
    ("unread_keys.jsonl", 1, ["FILE:1: keys … not read: category"]),
    ("newline_in_key.jsonl", 1, [r"FILE:1: keys … not read: a\nb"]),
    ("id_twice.jsonl", 2, ["FILE:2: id: '7' occurs … named by"]),
    ("empty_post.jsonl", 1, ["FILE:1: post is empty"]),
    ("post_without_headers.jsonl", 1, ["FILE:1: post without headers"]),
]


def read(path, **source):
    ledger = Ledger(str(path))
    return list(read_rows(FileSource(str(path), **source), "instruct", ledger)), ledger


def messages_of(ledger: Ledger, kinds) -> list[str]:
    return [text for kind in kinds for text in ledger.named[kind]]


def begins(messages: list[str], expected: list[str], path) -> bool:
    starts = [start.replace("FILE", str(path)) for start in expected]
    return len(messages) == len(starts) and all(
        re.match(re.escape(start).replace("…", ".*"), text) for text, start in zip(messages, starts, strict=True)
    )


@pytest.mark.parametrize(("name", "rows", "usable", "expected"), ROW_DEFECTS, ids=[case[0] for case in ROW_DEFECTS])
def test_defect_of_a_row_is_reported_and_the_other_rows_are_read(name, rows, usable, expected):
    conversations, ledger = read(MALFORMED / name)
    messages = messages_of(ledger, ledger.defects)
    assert begins(messages, expected, MALFORMED / name), messages
    assert (ledger.rows, len(conversations)) == (rows, usable)
    assert ledger.rows == len(conversations) + ledger.defects.total()
    assert not ledger.unread


@pytest.mark.parametrize(("name", "rows", "expected"), BREAKS, ids=[case[0] for case in BREAKS])
def test_file_that_can_not_be_read_to_its_end_reports_the_rows_before(name, rows, expected):
    conversations, ledger = read(MALFORMED / name)
    assert begins(ledger.unread, [expected], MALFORMED / name), ledger.unread
    read_before = f"after {rows} row{'s' if rows > 1 else ''}," if rows else "no row"
    assert re.search(rf"\({read_before} [^()]*\)$", ledger.unread[0]) or "holds no row" in expected
    assert ledger.rows == len(conversations) == rows
    assert not ledger.defects
    with pytest.raises(DataError, match=re.escape(ledger.unread[0])):
        read_all(FileSource(str(MALFORMED / name)), "instruct")


@pytest.mark.parametrize(("name", "rows", "expected"), NOTES, ids=[case[0] for case in NOTES])
def test_unusual_rows_are_noted_and_used(name, rows, expected):
    conversations, ledger = read(MALFORMED / name)
    messages = messages_of(ledger, ledger.notes)
    assert begins(messages, expected, MALFORMED / name), messages
    assert not ledger.defects
    assert not ledger.unread
    assert ledger.rows == len(conversations) == rows


def test_every_malformed_file_has_its_case():
    assert {p.name for p in FILES} == {case[0] for case in ROW_DEFECTS + BREAKS + NOTES}


def test_messages_are_one_line_and_show_no_more_than_the_beginning_of_a_value():
    _, ledger = read(MALFORMED / "long_value.jsonl")
    (text,) = messages_of(ledger, ledger.defects)
    assert text.startswith(f"{MALFORMED / 'long_value.jsonl'}:2: completion: list ['secret secret")
    assert text.count("secret") < 10
    for path in FILES:
        _, ledger = read(path)
        assert not any(
            re.search(r"[\n\ud800-\udfff]", text) for text in messages_of(ledger, ledger.named) + ledger.unread
        )


def test_long_line_is_read_and_noted_and_one_beyond_the_limit_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_LIMIT", 3 * 2**20)
    good = '{"prompt": "p", "completion": "c"}\n'
    long, too_long = (f'{{"prompt": "{"p" * size}", "completion": "c"}}\n' for size in (2**20, 4 * 2**20))
    path = tmp_path / "rows.jsonl"
    path.write_text(good + long + too_long + good + too_long.strip())
    conversations, ledger = read(path)
    assert [c.where for c in conversations] == [f"{path}:{n}" for n in (1, 2, 4)]
    assert messages_of(ledger, ledger.notes) == [f"{path}:2: line of 1,048,610 bytes"]
    (line,) = ledger.explain()
    assert re.fullmatch(rf"{path}:3: line of .* 3,145,728 bytes; .* \(2 such rows, also {path}:5\)", line)


def test_named_format_says_which_key_is_missing():
    path = MALFORMED / "unread_keys.jsonl"
    _, ledger = read(path, format="alpaca")
    (line,) = ledger.explain()
    assert begins(
        [line],
        [
            "FILE:1: instruction and output: missing, … prompt, completion, category; format alpaca … columns: {instruction: "
        ],
        path,
    )


def test_fifty_thousand_defects_of_a_kind_are_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": ""}\n' * 50_000)
    _, ledger = read(path)
    (line,) = ledger.explain()
    assert line.startswith(f"{path}:1: completion: empty text")
    assert "(50000 such rows" in line


@pytest.mark.parametrize(
    ("encoding", "said", "wrong", "remedy"),
    [
        ("cp1252", "It says “Pier – 5 €”", b"", "iconv -f cp1252 "),
        ("gb18030", "天气很好，今天去码头", b"", "gb18030"),
        ("cp932", "東京は日本の首都です", b"", "cp932"),
        ("cp1251", "Паром отходит в девять", b"", "cp1251"),
        ("utf-8", "It says “Pier – 5 €” and ", b"\xe9", "correct this place"),
        ("utf-8", "東京は日本の首都です", b"\xe9", "correct this place"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_remedy_for_another_encoding_gives_the_right_characters(encoding, said, wrong, remedy, suffix, tmp_path):
    """iconv -f latin1 would turn the quotes of Windows into control characters."""
    path = tmp_path / f"a{suffix}"
    rows = {
        ".jsonl": b'{"prompt": "q", "completion": "%s"}\n',
        ".csv": b"prompt,completion\nq,%s\n",
        ".json": b'[{"prompt": "q", "completion": "%s"}]',
    }
    path.write_bytes(rows[suffix] % (said.encode(encoding) + wrong))
    with pytest.raises(DataError) as error:
        read_all(FileSource(str(path)), "instruct")
    assert remedy in str(error.value)
    if encoding != "utf-8":
        path.write_bytes(path.read_bytes().decode(encoding).encode())
        assert read_all(FileSource(str(path)), "instruct")[0].answer == said


@pytest.mark.parametrize("wrong", ["It says \x93Pier\x94", "na\u00c3\u00afve", "it\u00e2\u20ac\u2122s"])
def test_text_damaged_by_a_wrong_conversion_is_noted(wrong, tmp_path):
    path, ledger = tmp_path / "a.csv", Ledger("a.csv")
    path.write_text(f"prompt,completion\nq,{wrong}\n", encoding="utf-8")
    read_all(FileSource(str(path)), "instruct", ledger=ledger)
    assert sum(ledger.notes.values()) == 1


@pytest.mark.parametrize("encoding", ["utf-32", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_wide_encodings_are_named(encoding, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_text('{"prompt": "q", "completion": "a"}\n', encoding=encoding)
    with pytest.raises(DataError, match=f"iconv -f utf-{encoding[4:6]}"):
        read_all(FileSource(str(path)), "instruct")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_of_empty_cells_below_a_table_are_skipped_and_noted(mark, end, tmp_path):
    path, ledger = tmp_path / "a.csv", Ledger("a.csv")
    path.write_bytes((mark + end.join(["prompt,completion", "q,a", ",", ",", "", ""])).encode())
    assert [c.answer for c in read_all(FileSource(str(path)), "instruct", ledger=ledger)] == ["a"]
    assert ledger.notes["row of empty cells, skipped"] == 2
