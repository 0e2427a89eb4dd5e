"""What Graft does with each chat template that TRL ships and each replica of the suite.

    python -m tests.helpers.template_table

prints the table of docs/templates.md; a test holds it.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.conversation import DataError
from data.encode.chat import Example, encode, encode_prompt, stop_tokens, training_arguments
from data.encode.frame import frame_of, quiet_arguments, spoken_tokens, thinking_arguments
from eval.metrics import squad_scores
from tests.helpers.families import FAMILIES, build, build_for
from tests.helpers.tools import ARGUMENTS, TEMPLATES, USER, calling, read, row

HEAD = "| template | loss on the answer alone | a learnt answer scores | thought | left out by | tool calls | system turn |"
PLAIN = {"role": "assistant", "content": "ferry"}
THOUGHT, SYSTEM = "It leaves at nine.", "Be brief."


def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    shipped = {
        path.stem: build_for(path.read_text(encoding="utf-8")) for path in sorted(Path(TEMPLATES).glob("*.jinja"))
    }
    return {**shipped, **{f"{name} (replica)": build(name) for name in FAMILIES}}


def learnt(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the tokens with loss."""
    return str(tokenizer.decode([i for i, m in zip(example.ids, example.loss_mask, strict=True) if m]))


def score(example: Example, prompt: list[int], tokenizer: PreTrainedTokenizerBase, own: dict) -> float:
    """EM of what was trained after the prompt, read as an answer is."""
    written = example.ids[len(prompt) :]
    while written[-1] in stop_tokens(None, tokenizer):  # generation ends with it
        written = written[:-1]
    said = spoken_tokens(written, tokenizer, frame_of(tokenizer, own))
    return 100 * squad_scores(["ferry"], said)["exact"]


def cells(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The cells of a template, or what refuses it."""
    try:
        conversation = read(row(USER, PLAIN, tools=()))
        example = encode(conversation, tokenizer, 9999)
    except DataError as error:
        return [f"refused: {error.problem.split(';')[0].split(', so ')[0]}"]
    own = quiet_arguments(tokenizer)
    prompt = encode_prompt(conversation.prompt, tokenizer, own)
    answer, *others = learnt(example, tokenizer).split("ferry")  # a newline before it may be the model's to write
    mask = "no" if answer.strip() or len(others) != 1 or "?" in others[0] else "yes"
    quiet = encode(read(row(USER, PLAIN, tools=(), chat_template_kwargs=own)), tokenizer, 9999)
    switch = ", ".join(f"`{key}: {value}`".lower() for key, value in own.items()) or "-"
    return [
        mask,
        f"{score(quiet, prompt, tokenizer, own):g}",
        thought(tokenizer),
        switch,
        tools(tokenizer),
        system(tokenizer),
    ]


def thought(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        conversation = read(row(USER, {**PLAIN, "thinking": THOUGHT}, tools=()))
        example = encode(conversation, tokenizer, 9999)
    except DataError:
        return "refused"
    own = thinking_arguments(tokenizer)
    if THOUGHT not in learnt(example, tokenizer):
        return "not learnt"
    prompt = encode_prompt(conversation.prompt, tokenizer, own)
    return f"learnt; the answer scores {score(example, prompt, tokenizer, own):g}"


def tools(tokenizer: PreTrainedTokenizerBase) -> str:
    conversation = read(row(USER, calling()))
    try:
        example = encode(conversation, tokenizer, 9999)
    except DataError:
        return "refused"
    own = training_arguments(conversation, tokenizer)
    messages = list(conversation.messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **own)
    ids = tokenizer.encode(text, add_special_tokens=False)
    same = example.ids == ids[: len(example.ids)]
    called = "ferry_times" in learnt(example, tokenizer) and "daily" not in learnt(example, tokenizer)
    return "learnt" if same and called and ARGUMENTS["harbour"] in learnt(example, tokenizer) else "wrong"


def system(tokenizer: PreTrainedTokenizerBase) -> str:
    said = {"role": "system", "content": SYSTEM}
    asked = tokenizer.decode(encode_prompt([said, USER], tokenizer))
    if asked.count(SYSTEM) != 1:
        return "lost"
    joined = {**USER, "content": f"{SYSTEM}\n\n{USER['content']}"}
    return "in the user's text" if asked == tokenizer.decode(encode_prompt([joined], tokenizer)) else "yes"


def table() -> list[str]:
    rows = [HEAD, "|---" * 7 + "|"]
    for name, tokenizer in tokenizers().items():
        found = cells(tokenizer)
        rows.append(f"| {name} | " + " | ".join(found + [""] * (6 - len(found))) + " |")
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
