"""Raw text for task `text`: rows with `text`, or the paragraphs of a .txt file."""

from pathlib import Path

from data.conversation import Conversation, DataError, Ledger
from data.readers.fields import shown_names, text
from data.readers.files import Row, Rows, not_utf8, read_lines


def read_paragraphs(path: Path, ledger: Ledger) -> Rows:
    """The paragraphs between blank lines; a paragraph's place is its first line."""
    first, lines = 1, list[str]()
    for number, line in read_lines(path, ledger):
        if isinstance(line, DataError):
            yield f"{path}:{number}", line
            continue
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            yield f"{path}:{number}", not_utf8(line, f"{path}:{number}")
            continue
        if not lines[-1].strip():
            lines.pop()
            if lines:
                yield f"{path}:{first}", {"text": "".join(lines)}
            first, lines = number + 1, []
    if lines:
        yield f"{path}:{first}", {"text": "".join(lines)}


def text_conversation(row: Row, where: str) -> Conversation:
    """The row's text as a conversation without an answer. Raises DataError if the row has no text."""
    if "text" not in row:
        remedy = "name the column that holds it: columns: {text: ...}"
        raise DataError(where, f"text: missing, the row's keys are {shown_names(row)}; {remedy}", "text: missing")
    context = text(row["text"], "text", where)
    return Conversation(({"role": "user", "content": context},), where, where, context=context)
