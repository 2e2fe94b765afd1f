"""Experts paged from disk: a set of slots in memory, and which experts are in them."""
