"""What a lesson leans on: the gate, weights, tokenisers, metrics, features, published files."""
