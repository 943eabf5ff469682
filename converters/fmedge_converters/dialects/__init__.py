"""One file per dialect: how a graph spells attention over a cache."""
