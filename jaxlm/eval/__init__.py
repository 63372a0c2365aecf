"""Tasks that a program can check: problems, prompts, solutions and verifiers."""
