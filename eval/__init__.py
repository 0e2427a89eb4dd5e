"""Predictions -> scores -> intervals -> comparisons. It may import data.

prediction.py          what a system answers to one question
predict.py             prompts -> greedy answers of a model in this process
generate.py            token ids of prompts -> token ids of answers, shared prefixes computed once
decode_batch.py        a batch of rows, whose answers are decoded together
likelihood.py          log-likelihoods of given answers: labels, and "unanswerable"
few_shot.py            solved examples before every question
client.py              the same questions to an OpenAI-compatible server
answer_log.py          the file from which an interrupted evaluation resumes
server_checks.py       does a server answer as the model does in this process?
spans.py               logits of a span model -> quotes, and the no-answer threshold
metrics.py             scores of one answer: EM, F1, labels, and those of eval.metrics
tasks.py               which scorer and which labels a task has
stats.py               intervals, paired tests, calibration
breakdown.py           scores by label, by probability and by kind of question
results.py             results.json and samples.jsonl of one system
compare.py             several systems on the same questions: `graft compare`
compare_report.py      report.md and report.html (compare_report.html) of a comparison
"""
