"""What router, node and exporter must agree on: pure, depends on msgspec only."""
