"""Multimodal reward models for TRL."""

__version__ = "0.1.0"
