"""Is the data good? Every row is counted, compared and encoded before training. It may import data,
data.readers and data.encode.

examine.py       sources -> encoded examples and the report, in one pass over the rows
row_counts.py    counts of what becomes of every row, by source and in total
leaks.py         duplicate rows, and training rows that are in the held-out data
duplicates.py    index of texts that answers which earlier text is equal, or nearly equal
triggers.py      rare words that always have one answer, as a planted backdoor would
split.py         which contexts are trained on, and which are held out
report.py        data_report.json, data_report.html (report.html) and tables for the terminal
"""
