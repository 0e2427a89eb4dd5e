"""Fine-tuning and what follows it: recipe, model, training, export, scores, serving.

It may import data and eval. Inside, imports run one way:
recipe < {models, kernels} < runs < training < {baselines, export} < scoring < serving < cli.

cli.py                 the `graft` command: options of every verb
train.py               the entry of every training: options, then adapter, whole model or baseline
quickstart.py          train, score, merge and serve in one command
session.py             start and end of a command: quiet libraries, errors as one line, exit codes
errors.py              errors that end a command with one line
untrusted.py           checks of a model, adapter or recipe before a library opens it
child_process.py       run vLLM and export tools so that they end with this process
child_supervisor.py    the process between the two, which stops them even after kill -9

recipe/                the YAML file of a run
models/                bases: found, loaded, tuned
kernels/               faster ways to compute a layer
runs/                  the run folder
training/              examples, steps, the trainer
baselines/             BERT heads, TF-IDF, floors
export/                merge, checks, formats
scoring/               eval, ladder, ask
serving/               vLLM, verify, chat
"""
