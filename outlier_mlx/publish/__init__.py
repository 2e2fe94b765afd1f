"""Publishing: a tier that verifies, its card and its licences, as one commit on the hub."""
