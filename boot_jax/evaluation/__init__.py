"""Looking: features, metrics, plots and the report."""
