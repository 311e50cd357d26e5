"""Measures of heatmaps: about the class, about the weights, and about what decides. They choose the default method."""
