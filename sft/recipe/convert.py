"""Turn the training file of another program into a recipe: `graft import FILE --out RECIPE`.

Each value is taken, taken with a comment that says what changes, or named in a comment at the end with what to do
instead. Values of keys that hold tokens are never copied.
"""

from pathlib import Path

from data.atomic import write_text
from data.terminal import print, quoted
from sft.errors import RecipeError
from sft.recipe.axolotl import from_axolotl
from sft.recipe.draft import read_other
from sft.recipe.llama_factory import from_llama_factory
from sft.recipe.load import check_recipe
from sft.recipe.openai_job import from_openai_job
from sft.recipe.peers import ADVICE, RENAMED, program_of
from sft.recipe.strict_yaml import YamlError, parse

PROGRAMS = {"LLaMA-Factory": from_llama_factory, "Axolotl": from_axolotl, "OpenAI fine-tuning": from_openai_job}


def import_file(file: Path, out: Path | None) -> None:
    """Write the recipe of another program's file to `out`, or print it. Raises RecipeError."""
    if out and out.exists():
        raise RecipeError(f"--out {out}: exists; name another file")
    text = convert(file)
    if out is None:
        print(text, end="")
        return
    write_text(out, text)
    print(f"written to {out}; read its comments, then: graft check {quoted(out)}")


def convert(file: Path) -> str:
    """The recipe, as YAML with comments. Raises RecipeError for a file of another kind, and for what no recipe does."""
    given = read_other(file)
    program = program_of(given)
    if program is None:
        known = "a LLaMA-Factory YAML, an Axolotl YAML and an OpenAI fine-tuning job's JSON are known"
        raise RecipeError(f"{file}: {known}, and this is none of them; write a recipe, see graft schema")
    try:
        draft = PROGRAMS[program](file, given)
    except OSError as error:  # such as a name that is too long
        raise RecipeError(f"{file}: {error.strerror or error}: {str(error.filename)[:60]}; correct the name") from error
    for key, value in draft.given.items():
        draft.leave(
            key, ADVICE.get(key) or (f"see {RENAMED[key]}" if key in RENAMED else "no key of a recipe does this"), value
        )
    text = draft.text()
    try:
        check_recipe(parse(text, str(file)), check_files=False)
    except (RecipeError, YamlError) as error:
        raise RecipeError(f"{file}: makes a recipe that is not valid; correct the file: {error}") from error
    return text
