"""Questions that a researcher asks of a trained model. Each module answers one and draws it."""
