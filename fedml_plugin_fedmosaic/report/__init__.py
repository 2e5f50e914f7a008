"""From metrics to tables, plots and pages."""
