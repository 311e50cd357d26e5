"""From raw data to a versioned archive: data, train, evaluate, export, with MLflow's tracking beside them."""
