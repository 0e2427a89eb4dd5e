"""Ask a run, an export, a base or a server, and score the answers. It may import data, eval and
the rooms of sft except sft.serving.

evaluate.py     score one system on held-out questions: `graft eval`
answerers.py    how a system is asked: by generating, by likelihood, or by its head
ask.py          one question or text: `graft ask`, `graft classify`
ladder.py       one recipe with several tuning methods, score against cost: `graft ladder`
"""
