"""Methods trained against each other over rates and seeds."""
