"""Text -> token ids -> packs. It may import only the files directly in data/.

chat.py               conversation -> ids and loss mask: the chat template is applied here only
markers.py            control markers in the data are split, so that they stay text
frame.py              what a template writes around an answer: thoughts, channels
calls.py              what a template makes of tools and calls
call_text.py          the form of a call in an answer, learnt from the template
steps.py              one request renders for many rows
template.py           renders a chat template within limits of time, memory and size
template_worker.py    the process that template.py starts for it
tokens.py             text -> ids as the tokenizer gives them; repeated texts are encoded once
pack.py               examples -> micro-batches; a shared prefix is computed once
prefix_savings.py     how much time and how many tokens shared prefixes save
example_store.py      encoded examples in a memory-mapped Arrow file
qa_windows.py         questions and passages -> windows for BERT's span head
"""
