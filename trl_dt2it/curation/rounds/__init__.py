"""Curation in rounds, each training from the base model.

Read it top down: `config` reads a configuration into a run; `run` plans the run as a list of stages, which `stages`
does once each, and holds the steps that decide; these use `training` (one training, one scoring), `sets` (the set of a
training, the ledger at a point of the run) and `results` (metrics, records and the summary).
"""
