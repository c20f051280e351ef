"""Tasks: how an answer is read and what it scores."""
