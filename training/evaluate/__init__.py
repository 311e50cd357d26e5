"""Measure a model: figures, calibration, explanations, model card."""
