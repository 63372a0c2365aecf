"""Sequential Monte Carlo: weights, resampling, the filter. It imports no model."""
