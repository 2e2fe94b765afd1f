"""Evaluation through lm-evaluation-harness, and scores held against the memory they take."""
