"""Rows -> conversations -> tokens -> packs. It may import no other room.

readers/           files, Hub datasets and the corpus of scikit-learn -> conversations
encode/            conversations -> token ids, loss masks, packs and windows
audit/             is the data good? the report, leaks, duplicates, planted triggers, splits
tool_calls.py      calls of tools, and the one text form of an answer with calls
conversation.py    Conversation, its defects, and the ledger of what reading a source finds
errors.py          UserError and the exit codes
atomic.py          files and folders that are written whole or not at all
inside.py          what a stranger's folder may hold: no link out of it, no FIFO, no device
cache.py           results on disk under a key that names their inputs; sha256 of files
terminal.py        print and Console, whose text can't act on the terminal or on a shell
progress.py        a progress bar in a terminal, plain lines elsewhere
redact.py          removes secrets from what is printed and written
page.py            HTML pages (page.html, charts.html) and Markdown tables
samples/           the small data sets of the sample recipes
"""
