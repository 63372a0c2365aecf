"""Search for better answers of one model: particles, beams and trees over decode states.

`base` (steps and results), `engine` (all rows of all prompts advance together), `particles`,
`gibbs`, `beam`.
"""
