"""Agents behind HTTP: OpenAI's shapes, batches of decisions, and what every server of ours does alike."""
