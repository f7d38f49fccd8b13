"""A server that devices connect to: Flower's Fleet API over TLS 1.3, and a stream that wakes."""
