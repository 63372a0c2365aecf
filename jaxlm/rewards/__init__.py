"""Rewards of growing texts: checkers, outcome and process reward models, any Python callable."""
