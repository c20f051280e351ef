"""Analysis of compiled programs (memory, operations and bytes per chip) and of the content of latent slots."""
