"""Choose which contexts are trained on and which are held out. Contexts and threads stay whole."""

import random
from collections.abc import Iterable, Mapping
from itertools import accumulate

import xxhash

from data.conversation import Conversation, DataError

Counts = tuple[int, int]  # number of a context's conversations, and of those without an answer


def context_key(conversation: Conversation) -> str:
    """A short name of the text that conversations share."""
    return xxhash.xxh3_64_hexdigest(conversation.context.encode(errors="surrogatepass"))


def count_contexts(conversations: Iterable[Conversation]) -> dict[str, Counts]:
    """Counts of each context by its key, in the order of their first conversations."""
    counts: dict[str, Counts] = {}
    for conversation in conversations:
        rows, empty = counts.get(key := context_key(conversation), (0, 0))
        counts[key] = (rows + 1, empty + (not conversation.answers))
    return counts


def chosen_contexts(
    contexts: Mapping[str, Counts], count: int, seed: int, unanswerable_share: float | None = None
) -> set[str]:
    """`count` contexts drawn at random, or all if there are fewer.

    unanswerable_share: the wanted share of conversations without an answer, reached by drawing more or fewer contexts
    that have such conversations. Raises DataError if the data allows no share within 0.02 of it.
    """
    if count >= len(contexts):
        return set(contexts)
    drawn = random.Random(seed).sample(list(contexts), len(contexts))
    if unanswerable_share is None:
        return set(drawn[:count])
    mixed = [c for c in drawn if contexts[c][1]]
    others = [c for c in drawn if not contexts[c][1]]
    first, last = max(0, count - len(others)), min(count, len(mixed))
    # sums over the first 0, 1, 2, ... contexts of each kind
    mixed_rows, other_rows = (list(accumulate((contexts[c][0] for c in kind), initial=0)) for kind in (mixed, others))
    empty = list(accumulate((contexts[c][1] for c in mixed), initial=0))

    def share(k: int) -> float:
        return empty[k] / (mixed_rows[k] + other_rows[count - k])

    best = min(range(first, last + 1), key=lambda k: abs(share(k) - unanswerable_share))
    if abs(share(best) - unanswerable_share) > 0.02:
        raise DataError(
            f"data.unanswerable_share {unanswerable_share}",
            f"the nearest that {count} contexts allow is {share(best):.2f}",
        )
    return {*mixed[:best], *others[: count - best]}


def held_out_by_share(cluster: str, share: float, seed: int) -> bool:
    """Whether a cluster (passage, thread) is held out; the same text is always on the same side."""
    return xxhash.xxh64_intdigest(cluster.encode(), seed=seed) < share * 2**64
