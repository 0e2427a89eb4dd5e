"""The rows of a baseline's recipe: trained on, held out of training to choose by, and scored."""

from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain

from data.audit.duplicates import TextIndex, normalize
from data.audit.examine import nothing_held_out
from data.audit.leaks import SAME_TEXT, LeakReport, Pairs
from data.audit.report import DataReport
from data.audit.row_counts import SourceReport, Totals
from data.audit.split import chosen_contexts, context_key, count_contexts, held_out_by_share
from data.cache import file_digests
from data.conversation import Conversation, DataError, Ledger
from data.readers.source import files_of, read_all
from sft.recipe.baseline_schema import BaselineRecipe
from sft.training.examples import pinned, with_split

DEV = 1  # added to the seed, so that dev_share and eval.share draw independently


@dataclass(frozen=True)
class Split:
    """`dev` chooses checkpoint and threshold. `report`: sources of the rows, and counts. `notes`: what the user should
    know of them."""

    train: list[Conversation]
    dev: list[Conversation]
    report: DataReport
    notes: list[str] = field(default_factory=list)


def read_split(recipe: BaselineRecipe) -> Split:
    """Rows of data.train without what eval.share holds out. Raises DataError: a line for each kind of defect."""
    rows: list[Conversation] = []
    sources = []
    for source in map(pinned, recipe.data.train):
        ledger = Ledger(source.path)
        every = read_all(source, recipe.task, recipe.data.on_error, ledger)
        rows += [c for c in every if not _is_held_out(c, recipe)]
        sources.append(SourceReport.of(ledger, revision=source.revision, sha256=file_digests(files_of(source))))
    if recipe.data.max_contexts is not None:  # the same that an LLM's recipe with that seed is trained on
        share, seed = recipe.data.unanswerable_share, recipe.train.seed
        drawn = chosen_contexts(count_contexts(rows), recipe.data.max_contexts, seed, share)
        rows = [c for c in rows if context_key(c) in drawn]
    rows, leaks, notes = _without_leaks(rows, recipe)
    share, seed = recipe.data.dev_share, recipe.train.seed + DEV
    dev = [c for c in rows if share and held_out_by_share(c.cluster, share, seed)]
    chosen = {id(c) for c in dev}
    train = [c for c in rows if id(c) not in chosen]
    if recipe.objective == "classification" and len({c.label for c in train}) == 1:
        raise DataError("", f"all rows to train on have the label {train[0].label}; a classifier needs two or more")
    if not train:
        raise DataError("", f"data.dev_share {share} leaves nothing to train on; lower it")
    if share and not dev:
        raise DataError("", f"data.dev_share {share} holds out nothing of {len(rows)} rows; raise it, or set it to 0")
    held_out = pinned(with_split(recipe.eval.data, "validation")) if recipe.eval.data else None
    report = DataReport(
        stops=[],
        created_by=f"graft {version('graft')}",
        task=recipe.task,
        max_length=recipe.data.max_seq_length,
        totals=Totals(
            rows_read=sum(s.rows_read or 0 for s in sources),
            defects=sum(sum(s.defects.values()) for s in sources),
            examples=len(train),
            contexts=len({context_key(c) for c in train}),
        ),
        sources=sources,
        held_out=SourceReport(held_out.path, revision=held_out.revision, sha256=file_digests(files_of(held_out)))
        if held_out
        else None,
        labels=dict(Counter(c.label for c in train if c.label).most_common()),
        leaks=leaks,
    )
    return Split(train, dev, report, notes)


def baseline_questions(recipe: BaselineRecipe) -> list[Conversation]:
    """eval.data, or what eval.share keeps apart; all of it. Raises DataError if there is none."""
    task, on_error = recipe.task, recipe.data.on_error
    if recipe.eval.data:
        questions = read_all(with_split(recipe.eval.data, "validation"), task, on_error)
    else:
        every = chain.from_iterable(read_all(source, task, on_error) for source in recipe.data.train)
        questions = [c for c in every if _is_held_out(c, recipe)]
    if not questions:
        raise DataError("", nothing_held_out(recipe.eval.share))
    return questions


def _without_leaks(
    rows: list[Conversation], recipe: BaselineRecipe
) -> tuple[list[Conversation], LeakReport, list[str]]:
    """The rows to train on, what is known of those whose passage or post is held out too, and a line that says it.
    Raises DataError if eval.share holds out nothing."""
    if recipe.objective == "mlm" or not (recipe.eval.data or recipe.eval.share):
        return rows, LeakReport(), []
    held_out, leaked = TextIndex(near=False), Pairs()
    for c in baseline_questions(recipe):
        if normalize(c.context):
            held_out.add(c.context, c.where)
    kept = []
    for c in rows:
        if match := held_out.find(c.context):
            leaked.add(SAME_TEXT, match, where=c.where, held_out=match.where)
        if not match or recipe.data.leaks == "keep":
            kept.append(c)
    count, removed = leaked.counts.total(), len(rows) - len(kept)
    leaks = LeakReport(
        checked=True,
        held_out_rows=len(held_out),
        rows=count,
        context=count,
        removed=removed,
        near_share=0,
        pairs=leaked.first,
    )
    if not count:
        return rows, leaks, []
    first = leaked.first[0]
    message = (
        f"{count} training rows have a text that stands in the held-out data, {first['where']} as {first['held_out']}"
    )
    if not kept:
        raise DataError("", f"data.leaks remove leaves nothing to train on: {message}")
    if removed:
        return kept, leaks, [f"{message}: they are left out"]
    return kept, leaks, [f"warning: {message} (data.leaks: remove leaves them out)"]


def _is_held_out(conversation: Conversation, recipe: BaselineRecipe) -> bool:
    share = recipe.eval.share
    key = conversation.cluster
    if recipe.eval.share_of == "rows":  # by content: an id may hold the path, which a run's recipe writes otherwise
        key = "\n".join((conversation.label, conversation.context, conversation.question))
    return share is not None and held_out_by_share(key, share, recipe.eval.seed)
