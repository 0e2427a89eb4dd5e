"""20 Newsgroups -> conversations: the groups' names, then the post without headers, footers and quotes.

Posts come from jsonl rows {"label", "text"}, from the folder layout of the corpus, or through scikit-learn.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data.conversation import Conversation, DataError, Ledger
from data.readers.fields import shown, text, type_name
from data.readers.files import Row, Rows, open_bytes

NEWSGROUPS = (
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
    "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey",
    "sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns",
    "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc",
)  # fmt: skip
# in the system turn, which comes first: all posts share it, and it is computed once
INSTRUCTION = "Which newsgroup is this post from? Answer with exactly one of:\n" + "\n".join(NEWSGROUPS)
SKLEARN = "sklearn:20newsgroups"
SUBSETS = ("train", "test", "all")

# lines of headers down to one that every post has; some posts begin with the second line of a long Path:, indented
HEADERS = re.compile(r"(?:(?:[A-Z][\w-]*:|[ \t]).*\n)*?(?:From|Subject):", re.IGNORECASE)
SUBJECT = re.compile(r"^Subject:(.*(?:\n[ \t].*)*)", re.IGNORECASE | re.MULTILINE)  # may go on in indented lines
REPLY = re.compile(r"\s*(?:re|fwd?)\s*(?:[\[^(]\d+[\])]?)?\s*:", re.IGNORECASE)  # Re: Re^2: Re[3]: Fwd:


def newsgroups_conversation(row: Row, where: str, ledger: Ledger) -> Conversation:
    """The post and its group. Raises DataError: a label that is no group, a text that is none.

    An empty post is kept and noted, so that scores are over the same posts as anywhere else.
    """
    raw, label = row["text"], text(row["label"], "label", where)
    if not isinstance(raw, str):
        problem = f"text: {type_name(raw)} {shown(raw)} where a post is expected"
        raise DataError(where, problem, f"text: {type_name(raw)}")
    if label not in NEWSGROUPS:
        near = get_close_matches(label.strip().lower(), NEWSGROUPS, n=1, cutoff=0.7)
        remedy = f"did you mean {near[0]!r}?" if near else f"the groups are {', '.join(NEWSGROUPS)}"
        raise DataError(where, f"label: {shown(label)} is none of the 20 newsgroups; {remedy}", "label: unknown")
    if HEADERS.match(raw):
        post, group = strip_post(raw), thread(raw)
    else:  # of a copy that is stripped already: a second time would cost it its first paragraph
        post, group = raw, ""
        ledger.note(where, "post without headers, taken as it is")
    if not post.strip():
        ledger.note(where, "post is empty without headers, quotes and footers")
    else:
        text(post, "text", where)
    return Conversation(
        messages=(
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": post},
            {"role": "assistant", "content": label},
        ),
        id=where,
        where=where,
        answers=(label,),
        context=post,
        group=group,
        label=label,
    )


def strip_post(raw: str) -> str:
    """What fetch_20newsgroups(remove=("headers", "footers", "quotes")) leaves of the post."""
    # private, but the public loader strips only what it downloads itself; a test compares them on the real corpus
    from sklearn.datasets import _twenty_newsgroups as loader

    post = loader.strip_newsgroup_header(raw)
    post = loader.strip_newsgroup_footer(post)  # before the quotes: the order matters, and is the loader's
    return loader.strip_newsgroup_quoting(post)


def thread(raw: str) -> str:
    """The post's subject without Re: and Fwd:, in lower case and single spaces; empty without a subject."""
    subject = SUBJECT.search(raw.partition("\n\n")[0])
    if subject is None:
        return ""
    title = subject[1]
    while reply := REPLY.match(title):
        title = title[reply.end() :]
    return " ".join(title.lower().split())


def posts_of(folder: Path) -> list[Path]:
    """Posts of a folder whose subfolders are named after the groups, sorted; empty if no subfolder is.

    Hidden files (.DS_Store) and folders further down are no posts.
    """
    if not any((folder / group).is_dir() for group in NEWSGROUPS):
        return []
    return sorted(path for path in folder.glob("[!.]*/[!.]*") if path.is_file())


def read_post(path: Path) -> Rows:
    """The one row of a post's file. Latin-1, as scikit-learn reads it: every byte is a character."""
    group = path.parent.name
    with open_bytes(path) as file:
        post = file.read().decode("latin-1")
    yield str(path), {"id": f"{group}/{path.name}", "label": group, "text": post}


def read_sklearn(split: str | None) -> Rows:
    """Posts that scikit-learn has in its cache or downloads, with their headers."""
    from sklearn.datasets import fetch_20newsgroups

    subset = split or "train"
    if subset not in SUBSETS:
        raise DataError(SKLEARN, f"split {subset!r}; must be one of {', '.join(SUBSETS)}", "unknown split")
    try:
        bunch: Any = fetch_20newsgroups(subset=subset, shuffle=False)
    except OSError as error:  # urllib's and socket's errors too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"not in scikit-learn's cache and can't be had ({reason})"
        remedy = "give the path of a copy: a folder with one subfolder for each group"
        raise DataError(SKLEARN, f"{problem}; {remedy}", "no data") from error
    for file, label, post in zip(bunch.filenames, bunch.target, bunch.data, strict=True):
        group = bunch.target_names[label]
        id = f"{group}/{Path(file).name}"
        yield f"{SKLEARN}[{subset}]: {id}", {"id": id, "label": group, "text": post}
