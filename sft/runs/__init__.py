"""The run folder and all that is written there. It may import data, eval, sft.recipe and
sft.models.

folder.py        choose, create and describe a run folder
manifest.py      versions, hardware, digests of data and base
checkpoint.py    checkpoints: committed whole, verified, rotated
resume.py        whether a run may be resumed
state.py         optimizer and random state as safetensors
metrics.py       metrics.jsonl and the plot of the loss
monitor.py       progress bar, rows of metrics, spikes, trackers
cost.py          time, memory and disk of a run; latency of its answers
interrupt.py     signals between two steps, and the lock of a folder
model_card.py    README.md of weights and exports
"""
