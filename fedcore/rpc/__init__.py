"""fedcore's own gRPC services: .proto files, and the stubs that are made from them."""
