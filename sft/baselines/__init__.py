"""Baselines: encoders with a head, continued pre-training, and floors without a trained encoder."""
