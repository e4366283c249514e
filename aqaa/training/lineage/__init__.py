"""How the systems of the lineage are trained: one file a system, and `table`, which runs them."""
