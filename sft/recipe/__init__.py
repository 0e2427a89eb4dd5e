"""The recipe: a strict YAML file that defines one run. It may import data, eval, sft.errors and
sft.untrusted.

schema.py             keys of a language model's recipe, and the sections that all recipes share
baseline_schema.py    keys of a baseline's recipe
load.py               read a recipe, apply --set, explain each mistake in one line
peers.py              keys of other programs, and what a recipe has instead
strict_yaml.py        YAML 1.2 without anchors, tags and repeated keys
"""
