"""A model in memory: what it needs, loading it, generating, and conversations."""
