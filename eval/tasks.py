"""Tasks: how an answer is scored. Readers turn rows into conversations, see data/readers/source.py."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from data.conversation import Conversation
from data.readers.newsgroups import NEWSGROUPS
from data.tool_calls import calls_in, spoken_text
from eval.metrics import OF_CALLS, label_scores, reference_scores, squad_scores


@dataclass(frozen=True)
class Task:
    """score: gold answers, a prediction and, for SQuAD's rows, the passage -> "exact" and a second score. version:
    raised with every change of prompt, reader or scorer that could change a score."""

    version: int
    score: Callable[..., dict[str, float]]
    labels: tuple[str, ...] = ()  # of a classification


def with_calls(conversations: Sequence[Conversation], metrics: Collection[str]) -> list[Conversation]:
    """The conversations; with a metric of calls also, before each, its part up to each earlier turn that calls a tool.

    The parts of a conversation are one cluster."""
    if not set(metrics).intersection(OF_CALLS):
        return list(conversations)
    return [part for c in conversations for part in (*_up_to_calls(c), c)]


def _up_to_calls(conversation: Conversation) -> Iterator[Conversation]:
    for i, message in enumerate(conversation.messages[:-1]):
        if calls_in(said := spoken_text(message)) and message["role"] == "assistant":
            yield replace(
                conversation,
                messages=conversation.messages[: i + 1],
                id=f"{conversation.id}, turn {i + 1}",
                answers=(said,),
                context="\n".join(m["content"] for m in conversation.messages[:i] if m["role"] != "system"),
                group=conversation.cluster,
            )


TASKS = {
    "squad_v2": Task(2, squad_scores),
    "squad_v1": Task(2, squad_scores),
    "newsgroups": Task(1, partial(label_scores, NEWSGROUPS), NEWSGROUPS),
    "instruct": Task(2, reference_scores),
}
