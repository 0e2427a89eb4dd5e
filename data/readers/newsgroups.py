"""20 Newsgroups -> conversations: the names of the groups, then the post without headers, footers and quotes.

Posts are jsonl rows {"label", "text"}, the files of the corpus in its folder layout, or scikit-learn's copy.
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
# the system turn comes first, so that the prefix that all posts share is computed once
INSTRUCTION = "Which newsgroup is this post from? Answer with exactly one of:\n" + "\n".join(NEWSGROUPS)
SKLEARN = "sklearn:20newsgroups"
SUBSETS = ("train", "test", "all")

# header lines down to From: or Subject:, one of which every post has; some posts begin with an indented second line of
# a long Path:
HEADERS = re.compile(r"(?:(?:[A-Z][\w-]*:|[ \t]).*\n)*?(?:From|Subject):", re.IGNORECASE)
SUBJECT = re.compile(r"^Subject:(.*(?:\n[ \t].*)*)", re.IGNORECASE | re.MULTILINE)  # may continue in indented lines
REPLY = re.compile(r"\s*(?:re|fwd?)\s*(?:[\[^(]\d+[\])]?)?\s*:", re.IGNORECASE)  # Re: Re^2: Re[3]: Fwd:


def newsgroups_conversation(row: Row, where: str, ledger: Ledger) -> Conversation:
    """The post and its group. Raises DataError for a label that is no group and for a text of another type.

    An empty post stays in the data and is noted, so that scores cover the same posts as published ones.
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
    else:  # the post is already stripped: stripping it again would remove its first paragraph
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
    """The post as fetch_20newsgroups(remove=("headers", "footers", "quotes")) returns it."""
    # private functions, as the public loader strips only its own downloads; a test compares both on the real corpus
    from sklearn.datasets import _twenty_newsgroups as loader

    post = loader.strip_newsgroup_header(raw)
    post = loader.strip_newsgroup_footer(post)  # before the quotes, as in the loader: the order matters
    return loader.strip_newsgroup_quoting(post)


def thread(raw: str) -> str:
    """The post's subject without Re: and Fwd:, in lower case and with single spaces; empty if there is none."""
    subject = SUBJECT.search(raw.partition("\n\n")[0])
    if subject is None:
        return ""
    title = subject[1]
    while reply := REPLY.match(title):
        title = title[reply.end() :]
    return " ".join(title.lower().split())


def posts_of(folder: Path) -> list[Path]:
    """Sorted posts of a folder whose subfolders are named after the groups; empty if no subfolder is.

    Hidden files (.DS_Store) and deeper folders are no posts.
    """
    if not any((folder / group).is_dir() for group in NEWSGROUPS):
        return []
    return sorted(path for path in folder.glob("[!.]*/[!.]*") if path.is_file())


def read_post(path: Path) -> Rows:
    """The one row of a post's file, read as Latin-1 like scikit-learn does: every byte is a character."""
    group = path.parent.name
    with open_bytes(path) as file:
        post = file.read().decode("latin-1")
    yield str(path), {"id": f"{group}/{path.name}", "label": group, "text": post}


def read_sklearn(split: str | None) -> Rows:
    """Posts with their headers, from scikit-learn's cache or downloaded by it."""
    from sklearn.datasets import fetch_20newsgroups

    subset = split or "train"
    if subset not in SUBSETS:
        raise DataError(SKLEARN, f"split {subset!r}; must be one of {', '.join(SUBSETS)}", "unknown split")
    try:
        bunch: Any = fetch_20newsgroups(subset=subset, shuffle=False)
    except OSError as error:  # urllib's and socket's errors too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"not in scikit-learn's cache and can't be downloaded ({reason})"
        remedy = "give the path of a copy: a folder with one subfolder for each group"
        raise DataError(SKLEARN, f"{problem}; {remedy}", "no data") from error
    for file, label, post in zip(bunch.filenames, bunch.target, bunch.data, strict=True):
        group = bunch.target_names[label]
        id = f"{group}/{Path(file).name}"
        yield f"{SKLEARN}[{subset}]: {id}", {"id": id, "label": group, "text": post}
