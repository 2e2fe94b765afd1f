"""Model folders: parts streamed into files, a manifest, and a folder that appears whole."""
