"""Training: options, the model they describe, the loop, runs loaded again, scores and metrics."""
