"""Decoding: the state, samplers, generation and scoring."""
