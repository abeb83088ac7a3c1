"""Verifiers: small models that give the verdicts of `safety`, `helpful`, `value`, `knowledge` and `general`."""
