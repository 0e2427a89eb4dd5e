"""The recipe's data as examples: examined once, written to the cache folder, and read from there by later runs."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.audit.examine import CALLS as TOOL_ROWS
from data.audit.examine import THOUGHTS, Rules, examine, nothing_held_out, read_held_out
from data.audit.report import DataReport
from data.audit.row_counts import Totals
from data.cache import CacheUnwritable, build_once, cache_key, file_digests, text_sha256
from data.conversation import ARGUMENTS, DATE, Conversation, DataError
from data.encode.call_text import PARSER, parser_of
from data.encode.calls import tool_use_of
from data.encode.chat import Example, TooLong, check_template, encode_turns, learning_last_turn
from data.encode.example_store import Examples
from data.encode.frame import frame_of, quiet_arguments, thinking_arguments
from data.encode.markers import ANSWER_TOKENS, answer_tokens
from data.encode.pack import Layout
from data.encode.prefix_savings import Sharing, measure_sharing
from data.encode.template import arguments_of, date_of
from data.encode.tokens import encoder_of, new_vocabulary
from data.progress import track
from data.readers.prompts import templates_of
from data.readers.source import COMMIT, files_of, hub_revision, is_hub_id, read_all
from data.terminal import print
from eval.results import limit_questions
from sft.errors import RecipeError
from sft.models.load import load_tokenizer
from sft.models.resolve import cache_dir
from sft.recipe.baseline_schema import AnyRecipe
from sft.recipe.load import nearest
from sft.recipe.schema import Recipe, Source, changed, common_prompts, with_prompts

REPORT = "report.json"
LIBRARIES = ("transformers", "tokenizers", "scikit-learn", "datasets", "datasketch")  # their versions change examples
# of a micro-batch. On 2 CPU cores SmolLM2-135M trains 24 questions a step 1.15 times as fast as with 512
PACK_TOKENS, GPU_PACK_TOKENS = {"forest": 1024}, {"forest": 4096, "flex_attention": 4096}
S = TypeVar("S", bound=Source)


def examined(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[DataReport, Examples | None]:
    """The report of the recipe's data, and its examples, encoded or from the cache; None if the data stops the run.

    Raises DataError if a source is missing or a file changes while it is read.
    """
    check_template(tokenizer, recipe.model.base)
    rules, sources = rules_of(recipe), [pinned(source) for source in recipe.data.train]
    held_out = pinned(with_split(recipe.eval.data, "validation")) if recipe.eval.data else None
    every = [*sources, *([held_out] if held_out else [])]
    digests = [file_digests(files_of(source)) for source in every]
    key = _key(every, digests, rules, tokenizer)

    def build(folder: Path) -> None:
        report = examine(sources, held_out, tokenizer, rules, folder)
        for source, sha256, described in zip(every, digests, report.all_sources, strict=True):
            if changed := {*sha256.items()} ^ {*file_digests(files_of(source)).items()}:
                raise DataError(min(changed)[0], "changed while it was read; start again once it is written")
            described.sha256, described.revision = sha256, source.revision
        if report.stops:
            raise _Stopped(complete(report, Examples(folder)))
        (folder / REPORT).write_text(json.dumps(report.to_json(), ensure_ascii=False), encoding="utf-8")

    def complete(report: DataReport, examples: Examples) -> DataReport:
        """Add what is not in the cache: names that are only shown, and figures that change with the steps."""
        template = str(tokenizer.chat_template)
        report.tokenizer = {"base": recipe.model.base, "chat_template_sha256": text_sha256(template)}
        dated = reads_date(template) and date_of(tokenizer) is None
        report.examples_sha256 = None if dated else examples.sha256()
        count_shared(report.totals, examples, recipe)
        return report

    with TemporaryDirectory(prefix="graft-examples-") as scratch:
        own = Path(scratch) / "examples"
        try:
            try:
                folder = build_once(cache_dir() / "examples" / key if key else own, build)
            except CacheUnwritable as error:
                print(f"{error}; the data is encoded for this run alone", file=sys.stderr, flush=True)
                folder = build_once(own, build)
        except _Stopped as stopped:
            return stopped.args[0], None
        # read before the scratch folder is removed: a mapped file outlives its name
        report = DataReport.from_json(json.loads((folder / REPORT).read_text(encoding="utf-8")))
        examples = Examples(folder)
        return complete(report, examples), examples


def training_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base's tokenizer; with template arguments only if the recipe states them, whatever an earlier run saved."""
    tokenizer = load_tokenizer(recipe.model)
    for key in (ANSWER_TOKENS, PARSER, *([ARGUMENTS] if recipe.model.template_arguments == "auto" else [])):
        tokenizer.init_kwargs.pop(key, None)
    if recipe.model.template_date == "auto":
        tokenizer.init_kwargs.pop(DATE, None)
        if reads_date(str(tokenizer.chat_template)):
            tokenizer.init_kwargs[DATE] = str(date.today())
    if recipe.data.answer_tokens != "auto":
        known = encoder_of(tokenizer).control
        for token in recipe.data.answer_tokens:
            if token not in known:
                near = nearest(token, list(known))
                raise RecipeError(f"data.answer_tokens: {token!r} is no added token of the tokenizer{near}")
        tokenizer.init_kwargs[ANSWER_TOKENS] = list(recipe.data.answer_tokens)
    return tokenizer


def decide_date(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Recipe, list[str]]:
    """The recipe with the date that the tokenizer's template writes, and a line for the user; for most templates the
    recipe as it is."""
    day = date_of(tokenizer)
    if recipe.model.template_date != "auto" or day is None:
        return recipe, []
    line = f"the chat template writes today's date: in this run {day} (model.template_date), whenever it is asked"
    return changed(recipe, model={"template_date": date.fromisoformat(day)}), [line]


def decide_tool_call_parser(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, report: DataReport) -> list[str]:
    """Save the parser of tool calls with the tokenizer, for serving; lines for the user."""
    parser = recipe.model.tool_call_parser
    if not any(TOOL_ROWS in source.notes for source in report.sources) or parser is None:
        return []
    if parser == "auto":
        parser = parser_of(tool_use_of(tokenizer).form)
    if parser is None:
        return ["rows have tools, and no parser of vLLM is known for the chat template; set model.tool_call_parser"]
    tokenizer.init_kwargs[PARSER] = parser
    return [f"rows have tools; `graft serve` reads calls by vLLM's parser {parser}"]


def decide_template_arguments(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, report: DataReport
) -> tuple[Recipe, list[str]]:
    """The recipe with template_arguments that ask the model as it is trained, which the tokenizer gets too, and lines
    for the user. `auto` stays if the data holds thoughts, since rows then differ, or if the template has no switch."""
    if recipe.model.template_arguments != "auto":
        return recipe, []
    if any(THOUGHTS in source.notes for source in report.sources):
        if thinking := thinking_arguments(tokenizer):
            tokenizer.init_kwargs[ARGUMENTS] = thinking
        return recipe, []
    quiet, opening = quiet_arguments(tokenizer), frame_of(tokenizer, {}).opening
    if quiet:
        tokenizer.init_kwargs[ARGUMENTS] = quiet
        line = f"no row holds a thought, so the chat template is given {json.dumps(quiet)}, in scoring and serving too"
        return changed(recipe, model={"template_arguments": quiet}), [line]
    lines = [f"the chat template writes {opening!r} before each answer, which is not learnt"] if opening else []
    return recipe, lines


def frozen_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> list[str]:
    """A warning if the data holds added tokens whose rows of the embedding stay as they are: new ones are random."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        return []
    used = examples.distinct_ids()
    if not (frozen := {i: text for i, text in new_vocabulary(tokenizer).items() if i in used and text.strip()}):
        return []
    tied = model.config.get_text_config().tie_word_embeddings
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    remedy = (
        f"tune.trainable_token_indices: {sorted(frozen)}"
        if tied
        else f"tune.modules_to_save: [{names[embedding]}, {names[head]}]"
    )
    shown = ", ".join(map(repr, [*frozen.values()][:3])) + (" ..." if len(frozen) > 3 else "")
    return [f"warning: the rows of the added tokens {shown} are not trained; if they are new, set {remedy}"]


def reads_date(template: str) -> bool:
    """Whether the template may render other text tomorrow, unless its date is fixed."""
    return "strftime_now" in template


def load_examples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Examples, DataReport]:
    """Training examples and the report on them. Raises DataError: a line for each thing that stops the run."""
    report, examples = examined(recipe, tokenizer)
    if examples is None:
        raise DataError("", "\n".join(report.stops), "data")
    return examples, report


def layout_of(recipe: Recipe, share: bool, implementation: str, on_gpu: bool = False) -> Layout:
    """The micro-batches of an attention back end; with data.pack_tokens auto they are of PACK_TOKENS tokens."""
    asked = recipe.data.pack_tokens
    tokens = (GPU_PACK_TOKENS if on_gpu else PACK_TOKENS).get(implementation, 512) if asked == "auto" else asked
    return Layout(share, tokens, "sparse" if implementation in ("forest", "flex_attention") else "dense")


def rows_layout(recipe: Recipe, on_gpu: bool, padded: bool) -> Layout:
    """The micro-batches of a model that does not follow a pack's mask: each example is a row of its own."""
    layout = layout_of(recipe, False, "forest", on_gpu)
    return replace(layout, attention="padded" if padded else "alone")


def sharing_of(examples: Examples, recipe: Recipe, implementation: str = "forest", on_gpu: bool = False) -> Sharing:
    """What sharing prefixes would do in the recipe's steps."""
    layout, train = layout_of(recipe, True, implementation, on_gpu), recipe.train
    return measure_sharing(examples, layout, train.examples_per_step, train.seed, recipe.data.max_branches)


def count_shared(totals: Totals, examples: Examples, recipe: Recipe) -> None:
    """Fill in the number of tokens that an epoch of the recipe's steps computes."""
    sharing = sharing_of(examples, recipe)
    shared = sharing.pays if recipe.data.share_prefixes == "auto" else recipe.data.share_prefixes
    ratio = sharing.ratio if shared else 1.0
    totals.executed_tokens = round((totals.tokens or 0) / ratio)
    totals.flat_tokens_per_executed_token = round(ratio, 3)


def rules_of(recipe: Recipe) -> Rules:
    data, audit = recipe.data, recipe.data.audit.model_dump()
    return Rules(
        task=recipe.task,
        max_length=data.max_length,
        max_leaks=audit.pop("leaks"),
        audit=audit,
        on_error=data.on_error,
        too_long=data.too_long,
        duplicates=data.duplicates,
        near_duplicates=data.near_duplicates,
        leaks=data.leaks,
        max_contexts=data.max_contexts,
        train_turns=data.train_turns,
        unanswerable_share=data.unanswerable_share,
        held_out_share=recipe.eval.share,
        held_out_seed=recipe.eval.seed,
        seed=recipe.train.seed,
    )


def held_out_conversations(recipe: Recipe) -> list[Conversation]:
    """eval.data, or the held-out share of data.train, cut to eval.limit; empty if the recipe has neither.

    Raises DataError for rows with defects, unless data.on_error says to skip them; then their number is printed.
    """
    if recipe.eval.data:
        conversations = read_all(with_split(recipe.eval.data, "validation"), recipe.task, recipe.data.on_error)
    elif recipe.eval.share:
        conversations = list(read_held_out(recipe.data.train, rules_of(recipe)))
    else:
        return []
    if not conversations:
        raise DataError("", nothing_held_out(recipe.eval.share))
    return limit_questions(conversations, recipe.eval.limit)


def load_held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Held-out examples for the loss during training; empty if the recipe does not ask for it."""
    if recipe.train.eval_strategy == "no":
        return []
    length = recipe.data.max_length
    examples, too_long = encode_held_out(held_out_conversations(recipe), tokenizer, length, recipe.data.train_turns)
    if too_long:
        print(f"{too_long} held-out rows longer than data.max_length {length} are not in the held-out loss", flush=True)
    return examples


def encode_held_out(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int, train_turns: str = "all"
) -> tuple[list[Example], int]:
    """Examples, and the number of conversations left out because they are longer than max_length."""
    examples: list[Example] = []
    too_long = 0
    for conversation in track(conversations, "encode held-out data"):
        learnt = learning_last_turn(conversation) if train_turns == "last" else conversation
        try:
            examples += encode_turns(learnt, tokenizer, max_length)
        except TooLong:
            too_long += 1
    if not examples:
        raise DataError("", f"all {too_long} held-out rows are longer than data.max_length {max_length}; raise it")
    return examples, too_long


def with_split(source: Source, default: str) -> Source:
    """The source with the default split if the recipe names none; files have no split."""
    if source.path.startswith("sklearn:") and default == "validation":
        default = "test"
    if source.split or files_of(source):
        return source
    return changed(source, split=default)


def other_questions(recipe: AnyRecipe | None, path: str, split: str | None = None) -> Source:
    """A source of other questions than the recipe's, asked as its own are."""
    prompts: dict[str, str] = {}
    if isinstance(recipe, Recipe):
        prompts = templates_of(recipe.eval.data) if recipe.eval.data else common_prompts(recipe.data.train)
    return with_split(with_prompts(Source(path=path, split=split), prompts), "validation")


def pinned(source: S) -> S:
    """A Hub dataset at its present commit, so that cache and report name the version that is read."""
    if not is_hub_id(source.path):
        return source
    return changed(source, revision=hub_revision(source.path, source.revision) or source.revision)


def _key(
    sources: Sequence[Source], digests: Sequence[dict[str, str]], rules: Rules, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """A digest of everything that the examples depend on; None if a source has no version."""
    for source, sha256 in zip(sources, digests, strict=True):
        if not sha256 and not COMMIT.fullmatch(source.revision or ""):
            return None
    template = str(tokenizer.chat_template)
    return cache_key(
        rules=rules.__dict__,
        sources=[source.model_dump(exclude={"license"}) for source in sources],
        files=[sorted(sha256.items()) for sha256 in digests],  # with names: a folder's may be its posts' label
        tokenizer=tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items()),
        special=[tokenizer.special_tokens_map, tokenizer.all_special_ids],
        template=template,
        arguments=arguments_of(tokenizer),
        today=(date_of(tokenizer) or str(date.today())) if reads_date(template) else "",
        answer_tokens=answer_tokens(tokenizer),
        libraries=[version(name) for name in LIBRARIES],
    )


class _Stopped(Exception):
    """Its argument is the report of data that must not be trained on, so nothing goes to the cache."""
