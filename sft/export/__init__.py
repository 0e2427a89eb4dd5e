"""From a run to a plain model: merge, check, combine, convert, push."""
