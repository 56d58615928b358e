"""Latency: the measuring protocol, tables of a model's parts, and what tells one device from another."""
