"""How long a step takes, and what fits, on a number of nodes that nobody has paid for yet."""
