"""What runs were: status, comparison, report."""
