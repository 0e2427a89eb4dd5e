"""From a run to a plain model that answers like it. It may import data, eval, sft.recipe,
sft.models, sft.runs and sft.training.

pipeline.py     the order of an export: merge, compare, convert, publish; verify it later
candidate.py    merge a run into one of its possible bases
merge.py        merge an adapter into its base, one file of the base at a time
skeleton.py     a model without memory for its weights, with PEFT's layers
shards.py       the safetensors files of a model folder
parity.py       does the merged model answer like the adapter on held-out rows?
integrity.py    are base, adapter, weights, template and stops those of the run?
combine.py      several adapters of one base -> one: `graft combine`
formats.py      fewer bits: compressed-tensors for vLLM, GGUF for llama.cpp
compress.py     the script that llm-compressor's own Python runs
push.py         an export -> the Hugging Face Hub: `graft push`
"""
