"""Hugging Face folders in and out: configs, weights, tokenizers."""
