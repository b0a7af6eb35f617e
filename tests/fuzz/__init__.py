"""Random programs of features, plans, optimizers and ids, on which the backends are held against each other."""
