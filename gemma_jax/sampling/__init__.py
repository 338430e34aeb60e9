"""Prompts in, new tokens out: rows, weights, the next token, the loop."""
