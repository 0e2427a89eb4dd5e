"""The rows of a baseline's recipe: to train on, to choose a checkpoint by, and to score."""

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
    """`dev` chooses the checkpoint and the threshold. `report`: sources and counts of the rows. `notes`: lines for the
    user."""

    train: list[Conversation]
    dev: list[Conversation]
    report: DataReport
    notes: list[str] = field(default_factory=list)


def read_split(recipe: BaselineRecipe) -> Split:
    """Rows of data.train that eval.share does not hold out. Raises DataError: a line for each kind of defect."""
    rows: list[Conversation] = []
    sources = []
    for source in map(pinned, recipe.data.train):
        ledger = Ledger(source.path)
        conversations = read_all(source, recipe.task, recipe.data.on_error, ledger)
        rows += [c for c in conversations if not _is_held_out(c, recipe)]
        sources.append(SourceReport.of(ledger, revision=source.revision, sha256=file_digests(files_of(source))))
    if recipe.data.max_contexts is not None:  # the same contexts as an LLM's recipe with this seed
        share, seed = recipe.data.unanswerable_share, recipe.train.seed
        drawn = chosen_contexts(count_contexts(rows), recipe.data.max_contexts, seed, share)
        rows = [c for c in rows if context_key(c) in drawn]
    rows, leaks, notes = _without_leaks(rows, recipe)
    share, seed = recipe.data.dev_share, recipe.train.seed + DEV
    train: list[Conversation] = []
    dev: list[Conversation] = []
    for c in rows:
        (dev if held_out_by_share(c.cluster, share, seed) else train).append(c)
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
    """All rows of eval.data, or those that eval.share holds out. Raises DataError if there are none."""
    task, on_error = recipe.task, recipe.data.on_error
    if recipe.eval.data:
        questions = read_all(with_split(recipe.eval.data, "validation"), task, on_error)
    else:
        conversations = chain.from_iterable(read_all(source, task, on_error) for source in recipe.data.train)
        questions = [c for c in conversations if _is_held_out(c, recipe)]
    if not questions:
        raise DataError("", nothing_held_out(recipe.eval.share))
    return questions


def _without_leaks(
    rows: list[Conversation], recipe: BaselineRecipe
) -> tuple[list[Conversation], LeakReport, list[str]]:
    """The rows to train on, a report of those whose passage or post is also held out, and a line about them. Raises
    DataError if eval.share holds out nothing."""
    if recipe.objective == "mlm" or not (recipe.eval.data or recipe.eval.share):
        return rows, LeakReport(), []
    held_out, pairs = TextIndex(near=False), Pairs()
    for c in baseline_questions(recipe):
        if normalize(c.context):
            held_out.add(c.context, c.where)
    clean = []
    for c in rows:
        if match := held_out.find(c.context):
            pairs.add(SAME_TEXT, match, where=c.where, held_out=match.where)
        else:
            clean.append(c)
    count, remove = pairs.counts.total(), recipe.data.leaks == "remove"
    leaks = LeakReport(
        checked=True,
        held_out_rows=len(held_out),
        rows=count,
        context=count,
        removed=count if remove else 0,
        near_share=0,
        pairs=pairs.first,
    )
    if not count:
        return rows, leaks, []
    first = pairs.first[0]
    message = f"{count} training rows repeat a held-out text; the first: {first['where']} repeats {first['held_out']}"
    if not remove:
        return rows, leaks, [f"warning: {message} (data.leaks: remove leaves them out)"]
    if not clean:
        raise DataError("", f"data.leaks remove leaves nothing to train on: {message}")
    return clean, leaks, [f"{message}: they are left out"]


def _is_held_out(conversation: Conversation, recipe: BaselineRecipe) -> bool:
    share = recipe.eval.share
    key = conversation.cluster
    if recipe.eval.share_of == "rows":  # by content: an id may contain the path, which differs in a run's recipe
        key = "\n".join((conversation.label, conversation.context, conversation.question))
    return share is not None and held_out_by_share(key, share, recipe.eval.seed)
