"""Generation, predictions and scores."""
