"""Layers shared by the stages: sparse convolution, attention, modulation, position embeddings."""
