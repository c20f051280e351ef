"""Evaluation: questions put to a model, results files and statistics."""
