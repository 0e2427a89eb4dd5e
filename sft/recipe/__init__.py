"""The recipe: a strict YAML file that defines one run. It may import data, eval, sft.errors and
sft.untrusted.

schema.py             keys of a language model's recipe, and the sections that all recipes share
baseline_schema.py    keys of a baseline's recipe
values.py             types of their values
load.py               read a recipe, apply --set, explain each mistake in one line
peers.py              keys of other programs, and what a recipe has instead
convert.py            `graft import`: another program's training file as a recipe
draft.py              a recipe in the making, and what those programs have in common
llama_factory.py      LLaMA-Factory's YAML and its dataset_info.json
axolotl.py            Axolotl's YAML
openai_job.py         the JSON of an OpenAI fine-tuning job
strict_yaml.py        YAML 1.2 without anchors, tags and repeated keys
"""
