"""The router: admission, placement and the request state machine, over gRPC and HTTP."""
