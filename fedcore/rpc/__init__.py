"""Network helpers of fedcore: its gRPC services, connections, limits and proxies."""
