"""What people have -> conversations, each of which knows its file and line. It may import only the
files directly in data/.

source.py         a source of the recipe (file, glob, folder, Hub dataset) -> conversations
files.py          bytes and lines of a file: gzip, encoding, limits
strict_json.py    JSON and JSON Lines, read strictly
tables.py         CSV, Parquet and Hub datasets
row_formats.py    recognises a row's format and renames its columns
instruct.py       messages, sharegpt, alpaca and prompt_completion
tools.py          tools and their calls in rows of turns
prompts.py        turns that a source writes from columns
squad.py          SQuAD 1.1 and 2.0
newsgroups.py     20 Newsgroups
raw_text.py       raw text: rows with `text`, paragraphs of a .txt file
fields.py         checks of a row's values, and how a message shows a value
"""
