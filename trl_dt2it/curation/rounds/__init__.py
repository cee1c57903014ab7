"""Curation in rounds, each training from the base model."""
