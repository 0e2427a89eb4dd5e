"""Training, from the recipe to published weights. It may import data, eval, sft.recipe,
sft.models, sft.kernels and sft.runs.

finetune.py            the order of a training: load, resolve `auto`, train, publish
open_run.py            a run from the lock to its end, for adapters and baselines
examples.py            the recipe's data as examples, cached
auto.py                decide what the recipe leaves to `auto`
memory.py              the bytes of a training, counted before it starts
plan.py                which examples each step trains on
step.py                the loss and gradients of a step
noise.py               NEFTune's noise on the embeddings of a pack
trainer.py             TRL's trainer over packs; the only file that knows TRL
durable_trainer.py     whole checkpoints, exact resume, only finite weights
attention.py           a pack as arguments of a model; attention back ends
compile_layers.py      compile decoder layers if it pays
flops.py               floating-point operations of a training
check_data.py          `graft check` and `graft show`
dry_run.py             `graft train --dry-run`
retries.py             `graft train --retries`
"""
