"""Predictions -> scores -> intervals."""
