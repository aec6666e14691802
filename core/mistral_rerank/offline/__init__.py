"""Offline scoring of more pairs than one process can score: shards of a data set on a Ray cluster."""
