"""Systems to compare a fine-tuned language model with: encoders with a head, continued
pre-training, and floors without a trained encoder. It may import data, eval, sft.recipe,
sft.models, sft.runs and sft.training.

train.py      train a baseline as its recipe says
data.py       rows to train on, to choose a checkpoint by, and to score
trainer.py    the trainer of an encoder, its arguments and its schedule of layers
encoder.py    load an encoder with a head, choose its trainable part, predict
heads.py      classification and extractive QA: rows, scores on the dev slice, answers
mlm.py        continued pre-training on masked tokens and next sentences
floors.py     TF-IDF classifiers, most frequent label, always unanswerable, lexical overlap
embed.py      frozen embeddings of texts, used beside TF-IDF
"""
