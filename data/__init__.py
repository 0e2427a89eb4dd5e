"""Rows -> conversations -> tokens -> packs."""
