"""Analyses of models: outlier features, by the definitions that exist."""
