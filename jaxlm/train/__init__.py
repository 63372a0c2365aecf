"""Training: objectives and step pairs over plain trees."""
