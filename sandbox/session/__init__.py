"""One session: opens every part, runs actions through the broker, and folds events into a result."""
