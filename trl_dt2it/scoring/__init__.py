"""Scoring: rewards for pairs, data sets and sampled answers."""
