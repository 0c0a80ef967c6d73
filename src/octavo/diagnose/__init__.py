"""What casts do to the tensors of a model: statistics of each, written down as it trains, and tensors kept whole."""
