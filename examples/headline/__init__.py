"""What federated training reaches beside centralised and local-only training, on public data."""
