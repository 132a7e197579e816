"""Router benchmark: one set of simulated workers, several systems in front of them."""
