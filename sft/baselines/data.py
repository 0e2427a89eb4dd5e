"""The rows of a baseline's recipe: trained on, held out of training to choose by, and scored."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from data.audit.duplicates import TextIndex, normalize
from data.audit.examine import context_key, nothing_held_out
from data.audit.leaks import PAIRS, SAME_TEXT, LeakReport
from data.audit.report import DataReport
from data.audit.row_counts import SourceReport, Totals
from data.audit.split import Counts, chosen_contexts, held_out_by_share
from data.cache import file_digests
from data.conversation import Conversation, DataError, Ledger
from data.progress import track
from data.readers.source import files_of, read_rows
from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.schema import Source
from sft.training.examples import pinned, with_split

DEV = 1  # added to the seed, so that dev_share and eval.share draw independently


@dataclass(frozen=True)
class Split:
    """`dev` chooses checkpoint and threshold. `report`: where the rows came from and how many there were. `notes`: what
    the user should know of them."""

    train: list[Conversation]
    dev: list[Conversation]
    report: DataReport
    notes: list[str] = field(default_factory=list)


def read_split(recipe: BaselineRecipe) -> Split:
    """Rows of data.train without what eval.share holds out. Raises DataError: a line for each kind of defect."""
    rows: list[Conversation] = []
    sources = []
    for source in map(pinned, recipe.data.train):
        found, ledger = _read(source, recipe)
        rows += [c for c in found if not _is_held_out(c, recipe)]
        sources.append(SourceReport.of(ledger, revision=source.revision, sha256=file_digests(files_of(source))))
    rows = _drawn(rows, recipe)
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
    """eval.data, or what eval.share keeps apart; all of it. Raises DataError where there is none."""
    if recipe.eval.data:
        found, _ = _read(with_split(recipe.eval.data, "validation"), recipe)
    else:
        every = (c for source in recipe.data.train for c in _read(source, recipe)[0])
        found = [c for c in every if _is_held_out(c, recipe)]
    if not found:
        raise DataError("", nothing_held_out(recipe.eval.share))
    return found


def _read(source: Source, recipe: BaselineRecipe) -> tuple[list[Conversation], Ledger]:
    ledger = Ledger(source.path)
    found = list(track(read_rows(source, recipe.task, ledger), f"read {Path(source.path).name}"))
    if ledger.unread or (ledger.defects and recipe.data.on_error == "stop"):
        raise DataError("", "\n".join(ledger.explain()), "defects")
    if ledger.defects:
        print(f"{ledger.defects.total()} rows of {source.path} have defects and are left out", flush=True)
    return found, ledger


def _without_leaks(
    rows: list[Conversation], recipe: BaselineRecipe
) -> tuple[list[Conversation], LeakReport, list[str]]:
    """The rows to train on, what is known of those whose passage or post is held out too, and a line that tells it.
    Raises DataError where eval.share holds out nothing."""
    if recipe.objective == "mlm" or not (recipe.eval.data or recipe.eval.share):
        return rows, LeakReport(), []
    held_out = TextIndex(near=False)
    texts = {c.context: c.where for c in reversed(baseline_questions(recipe)) if c.context.strip()}  # first places
    for text, where in texts.items():
        held_out.add(text, where)
    found = {text: held_out.find(text) for text in {c.context for c in rows} if normalize(text)}
    leaked = [(c, match) for c in rows if (match := found.get(c.context))]
    removed = recipe.data.leaks == "remove"
    leaks = LeakReport(
        checked=True,
        held_out_rows=len(held_out),
        rows=len(leaked),
        context=len(leaked),
        removed=len(leaked) if removed else 0,
        near_share=0,
        pairs=[
            {"where": c.where, "held_out": match.where, "kind": SAME_TEXT, "similarity": 1.0}
            for c, match in leaked[:PAIRS]
        ],
    )
    if not leaked:
        return rows, leaks, []
    first, match = leaked[0]
    told = f"{len(leaked)} training rows have a text that stands in the held-out data, {first.where} as {match.where}"
    if removed and len(leaked) == len(rows):
        raise DataError("", f"data.leaks remove leaves nothing to train on: {told}")
    if removed:
        return [c for c in rows if not found.get(c.context)], leaks, [f"{told}: they are left out"]
    return rows, leaks, [f"warning: {told} (data.leaks: remove leaves them out)"]


def _is_held_out(conversation: Conversation, recipe: BaselineRecipe) -> bool:
    share = recipe.eval.share
    key = conversation.cluster
    if recipe.eval.share_of == "rows":  # by content: an id may hold the path, which a run's recipe writes otherwise
        key = "\n".join((conversation.label, conversation.context, conversation.question))
    return share is not None and held_out_by_share(key, share, recipe.eval.seed)


def _drawn(rows: Sequence[Conversation], recipe: BaselineRecipe) -> list[Conversation]:
    """The rows of data.max_contexts contexts: the same that an LLM's recipe with that seed is trained on."""
    count = recipe.data.max_contexts
    if count is None:
        return list(rows)
    found: dict[str, Counts] = {}
    for key, conversation in _keyed(rows):
        total, empty = found.get(key, (0, 0))
        found[key] = (total + 1, empty + (not conversation.answers))
    chosen = chosen_contexts(found, count, recipe.train.seed, recipe.data.unanswerable_share)
    return [c for key, c in _keyed(rows) if key in chosen]


def _keyed(rows: Sequence[Conversation]) -> Iterator[tuple[str, Conversation]]:
    return ((context_key(c), c) for c in rows)
