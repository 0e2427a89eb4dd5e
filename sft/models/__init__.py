"""Base models: found, loaded in the recipe's precision, tuned. It may import data, eval and
sft.recipe.

resolve.py         the folder or Hub id of a base; .gguf files become safetensors once
load.py            config, tokenizer and weights, quantized or not
target.py          the model that a command names: run, export or base
tune.py            what is trained: PEFT's methods, full, freeze, linear_probe
adapter_init.py    first values of LoRA; PiSSA and OLoRA are saved as plain LoRA
patterns.py        tries regular expressions of recipes and adapters within a time
capabilities.py    whether a model takes packs, padding or virtual tokens
speed.py           matrix products a second, and whether bfloat16 is faster
"""
