"""Where a stage's metrics go: a CSV file always, Weights & Biases and Lightning's loggers by name."""
