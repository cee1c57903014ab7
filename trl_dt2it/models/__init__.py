"""Reward models: classes, loading, shared prefixes, and what differs between families."""
