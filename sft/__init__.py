"""Training and what follows it: recipe, model, trainer, export, serve."""
