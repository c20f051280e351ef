"""Evaluation: asking a model, results files and statistics."""
