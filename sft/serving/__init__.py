"""Serve a run, an export or a base with vLLM, and check that the server answers like the run.
It may import data, eval and every other package of sft.

serve.py         start vLLM, wait until it answers, restart it: `graft serve`
targets.py       targets of `graft serve` -> one model and its adapters, checked
gatekeeper.py    demands the key on every route, limits the size of a request
server_log.py    vLLM's log -> why it stopped, and the remedy
verify.py        does the server answer like the run? `graft verify RUN URL`
bench.py         throughput and latency under load: `graft bench serve`
chat.py          talk to a run, an export, a base or a server: `graft chat`
"""
