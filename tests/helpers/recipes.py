"""The smallest recipe, and the same with another value."""

import json

MINIMAL = {
    "task": "squad_v2",
    "model": {"base": "owner/model"},
    "data": {"train": "data/samples/squad_train.json"},
}


def with_key(path: str, value: object) -> dict:
    tree = json.loads(json.dumps(MINIMAL))
    node = tree
    *parents, last = path.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return tree
