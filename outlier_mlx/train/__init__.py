"""Making overlays: ternary experts trained over a frozen base."""
