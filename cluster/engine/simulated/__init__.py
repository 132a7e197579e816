"""An engine with a timing model in place of a network: real scheduling, made-up tokens."""
