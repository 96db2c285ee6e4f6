"""Restored images against sharp ones: data sets, published protocols, and the report of both."""


class EvaluationError(Exception):
    """What was asked for cannot work; the message is one sentence for the user."""
