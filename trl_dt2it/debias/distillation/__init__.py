"""Distillation: preference pairs built from judged candidates of one pool."""
