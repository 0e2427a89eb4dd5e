"""Report what the model would learn from which file and line, before anything is trained.

graft check RECIPE          report on all data: data_report.json, data_report.html, a table
graft show FILE --n 5       print a few examples, with the trained tokens coloured
"""

from itertools import islice
from pathlib import Path

from data.audit.report import print_example, print_report
from data.audit.row_counts import decoded
from data.conversation import DataError, Ledger
from data.encode.chat import encode_turns
from data.readers.source import SourceLike, read_rows
from data.terminal import Console, print
from eval.tasks import TASKS
from sft.errors import RecipeError
from sft.models.load import load_tokenizer
from sft.recipe.schema import Model, Recipe
from sft.runs.folder import check_writable, write_report
from sft.training.examples import decide_date, examined, training_tokenizer

ANY_LENGTH = 1_000_000  # tokens; `show` has no max_length


def check(recipe: Recipe, name: str, out: Path) -> bool:
    """Write the data report to `out` and print it; False if the data stops the run."""
    check_writable(out, "--out")
    tokenizer = training_tokenizer(recipe)
    report, _ = examined(recipe, tokenizer)
    report.recipe = name
    write_report(report, out)
    print_report(report, Console())
    for line in decide_date(recipe, tokenizer)[1]:
        print(line)
    print(f"written to {out}/data_report.html and data_report.json")
    return not report.stops


def show(source: SourceLike, count: int, base: str, task: str) -> None:
    """Print the first examples of a file as the model sees them, then the defects of the rows between them.

    Raises DataError if no row can be encoded.
    """
    if task not in TASKS:
        raise RecipeError(f"--task {task}: name one of {', '.join(TASKS)}")
    console = Console()
    tokenizer = load_tokenizer(Model(base=base))
    ledger = Ledger(source.path)
    shown = 0
    for conversation in read_rows(source, task, ledger):
        try:
            examples = encode_turns(conversation, tokenizer, ANY_LENGTH)
        except DataError as error:
            ledger.defect(error)
            continue
        for example in islice(examples, count - shown):
            print_example(decoded(example, tokenizer), console)
            shown += 1
        if shown >= count:
            break
    if not shown:
        raise DataError("", "\n".join(ledger.explain()) or f"{source.path}: holds no row")
    for line in ledger.explain():
        console.print(f"not shown: {line}", style="red", highlight=False)
