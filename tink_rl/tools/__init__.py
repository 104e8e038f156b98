"""Look at a machine, a model, a server, an adapter or a run; write a policy in the Hub's format."""
