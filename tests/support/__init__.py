"""What tests share: servers, runs, roles and processes."""
